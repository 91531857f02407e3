"""Two stages of ours against two ranks of mlx-lm's pipeline on the ring, same weights, same greedy tokens.

    exo-kimi bench pipeline [--rounds N]

Decoding at 1, 2 and 4 streams on a toy whose layers outweigh a hop; then, on a thinner one, whose long prompts finish here,
the first token of a prompt of 2,000 tokens, alone and while another stream decodes. Ratios above 1 are in our favour, that of
the gaps between tokens below 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from exo_kimi.bench.frame import Direction, Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.awake import awake
from exo_kimi.bench.setups.our_stages import OurStages
from exo_kimi.bench.setups.peer import copy_for_peer
from exo_kimi.bench.setups.ring import Ring
from exo_kimi.bench.setups.traffic import TokenTimes, Traffic
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError

HEAVY = {
    "num_hidden_layers": 9,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 64,
}
THIN = HEAVY | {
    "hidden_size": 256,
    "q_lora_rank": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
}
VOCABULARY = 700  # below the control tokens of the toy
STAGES = 2
LONG = 2000
SHORT = 2
SETTLED = 3
"""Tokens of each stream after which a rate is taken: both have filled their pipeline then."""
CONTEXT = 4096
DEADLINE_S = 90.0
Pair = tuple[TokenTimes, TokenTimes]


class Measure(Protocol):
    """Runs requests (prompt tokens, new tokens, after) on both; `alone`: in their generator for one."""

    def __call__(self, requests: list[tuple[int, int, int]], rounds: int, *, alone: bool = False) -> list[Pair]: ...


def run(*, rounds: int) -> Result:
    """All rows. The ring is skipped where it cannot run."""
    if reason := _missing():
        return Result(bench="pipeline", skipped=reason)
    rows: list[Row] = []
    with _both(HEAVY) as measure:
        for streams, new_tokens, bar in ((1, 16, 1.05), (2, 16, 1.8), (4, 12, 1.8)):
            pairs = measure([(SHORT, new_tokens, 0)] * streams, rounds)
            name = f"decode, {streams} stream{'s' * (streams > 1)}"
            rows.append(_row(name, pairs, _settled, "tokens/s", bar, inverse=True))
        pairs = measure([(SHORT, 16, 0)], rounds, alone=True)
        note = "theirs: generate_step, which no server of theirs uses"
        rows.append(_row("decode, no server", pairs, _settled, "tokens/s", None, inverse=True, note=note))
    with _both(THIN) as measure:
        rounds = max(1, rounds // 3)  # they take long, and vary less
        pairs = measure([(LONG, 2, 0)], rounds)
        rows.append(_row(f"first token of {LONG}", pairs, lambda seen: seen.ttft_s, "s", 1.6))
        pairs = measure([(8, 64, 0), (LONG, 2, 6)], rounds)
        meanwhile = ", ".join(str(seen.tokens_meanwhile()) for seen in pairs[-1])
        rows.append(
            _row(
                "p99 between tokens meanwhile",
                pairs,
                lambda seen: seen.worst_gap_s(),
                "s",
                1 / 3,
                inverse=True,
                direction="at most",
                note=f"tokens meanwhile: {meanwhile}",
            )
        )
        rows.append(_row(f"first token of {LONG} meanwhile", pairs, lambda seen: seen.ttft_s, "s", None))
    return Result(bench="pipeline", against=f"mlx-lm {version('mlx-lm')} on the ring", rows=rows, notes=_notes())


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench pipeline", description="two stages against mlx-lm's pipeline")
    parser.add_argument(
        "--rounds", type=int, default=5, help="pairs of runs per row (default 5), a third of them of long prompts"
    )
    options = parser.parse_args(argv)
    return finish(run(rounds=options.rounds), options)


@contextmanager
def _both(config: dict[str, int]) -> Iterator[Measure]:
    """Ours and theirs on one checkpoint; what is given measures a traffic on both, in turn."""
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        # Absorbed, because mlx-lm quantizes a kv_b_proj a second time, after which its tokens would be others.
        directory = make_tiny(Path(folder) / "toy", recipe="uniform4", config=config, absorbed=True, dtype="F32")
        copy = copy_for_peer(directory, Path(folder) / "peer")
        with (
            OurStages.started(directory, stages=STAGES, context=CONTEXT) as ours,
            Ring.started(copy, ranks=STAGES) as ring,
            awake(),
        ):

            def theirs(traffic: Traffic, *, alone: bool = False) -> TokenTimes:
                answer = ring.run(traffic.order() | {"alone": alone}, deadline_s=DEADLINE_S)
                submitted = [0.0] * len(traffic.prompts)
                return TokenTimes(
                    tokens=answer["tokens"], times=answer["times"], submitted=answer.get("submitted", submitted)
                )

            def measure(requests: list[tuple[int, int, int]], rounds: int, *, alone: bool = False) -> list[Pair]:
                traffic = Traffic.of(requests, vocab_size=VOCABULARY)
                return taken_in_turn(
                    lambda: ours.run(traffic), lambda: theirs(traffic, alone=alone), rounds=rounds, warm=0
                )

            warm = Traffic.of([(4, 2, 0)], vocab_size=VOCABULARY)
            ours.run(warm)
            theirs(warm)
            yield measure


def _row(
    name: str,
    pairs: list[Pair],
    figure: Callable[[TokenTimes], float],
    unit: str,
    bar: float | None,
    *,
    inverse: bool = False,
    direction: Direction = "at least",
    note: str = "",
) -> Row:
    equal = all(ours.tokens == theirs.tokens for ours, theirs in pairs)
    figures = [(figure(ours), figure(theirs)) for ours, theirs in pairs]
    return Row.of_pairs(name, figures, unit=unit, bar=bar, direction=direction, inverse=inverse, note=note, equal=equal)


def _settled(seen: TokenTimes) -> float:
    return seen.tokens_per_s(after=SETTLED)


def _missing() -> str | None:
    if not mx.distributed.is_available():
        return "this MLX has no ring"
    if version("mlx-lm").startswith("0.31."):
        return f"the pipeline of mlx-lm {version('mlx-lm')} loses a layer where they do not divide"
    return None


def _notes() -> list[str]:
    return [
        "heavy toy: 9 layers, D 512, 32 experts top-8 of 512; long prompts: 9 layers, D 256, 2 heads, 16 experts top-2 of 64",
        "theirs: BatchGenerator (prefill steps of 2,048), which mlx_lm.server drives, over the ring without a server; its ranks",
        "are stopped (SIGSTOP) while ours runs, because a rank that waits spins; beside both a process per",
        "core spins at idle priority, because a virtual core that has slept is slow for a while",
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(str(error))
