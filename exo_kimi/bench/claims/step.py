"""One decode step of a 61-layer toy beside mlx-lm's, same weights and same greedy tokens: primitives, dispatches and time.

Ratios are ours over theirs. Primitives are the nodes of a step's lazy graph, views among them. A GPU runs a norm, a
rotation and a softmax-attention in one kernel each and no kernel for a view; `dispatches` counts so. A token's time is that
of whole loops: ours answers steps as a stage does, theirs is `generate_step`, which runs one token ahead.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.bench.frame import Result, Row, finish, seconds, taken_in_turn
from exo_kimi.bench.setups.primitives import dispatches, one_kernel_each, primitives
from exo_kimi.bench.setups.thin import Thin, thin_models
from exo_kimi.models.kimi_k2 import PIECE_LAYERS
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Segment, SequenceStart, Step

PROMPT = tuple(range(1, 33))
TOKENS = 16
LEADER_S = 0.005
"""What a leader may take for text, events, a grammar's mask and the next step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench step", description="a decode step beside mlx-lm's")
    parser.add_argument("--rounds", type=int, default=5, help="runs of both, taken in turn (default 5)")
    options = parser.parse_args(arguments)
    return finish(measure(options.rounds), options)


def measure(rounds: int) -> Result:
    """All rows."""
    with thin_models() as models:
        ours, theirs = OurLoop(models), TheirLoop(models)
        pairs = taken_in_turn(ours.run, theirs.run, rounds=rounds)
        equal = [token for (token,) in ours.tokens] == theirs.tokens
        ahead = [ahead_row(models, streams, rounds) for streams in (1, 4)]
        built = taken_in_turn(lambda: graph_s(models, ours=True), lambda: graph_s(models, ours=False), rounds=rounds)
        plain = taken_in_turn(lambda: step_s(models, ours=True), lambda: step_s(models, ours=False), rounds=rounds)
        count, dispatched = counts(models)
    share = [(mine, whole - mine) for (mine, _), (whole, _) in zip(built, plain, strict=True)]
    rows = [
        count,
        dispatched,
        Row.of_pairs("time per token", pairs, unit="s", bar=0.8, direction="at most", inverse=True, equal=equal),
        Row.of_pairs("one step, nothing ahead", plain, unit="s", bar=0.8, direction="at most", inverse=True),
        Row.of_pairs("building a step's graph", built, unit="s", inverse=True),
        Row.of_pairs(
            "building over evaluating, ours",
            share,
            unit="s",
            bar=1.0,
            direction="at most",
            inverse=True,
            note="theirs: the time that evaluating takes",
        ),
        *ahead,
    ]
    return Result(bench="step", against=f"mlx-lm {version('mlx-lm')}", rows=rows)


def ahead_row(models: Thin, streams: int, rounds: int) -> Row:
    """A stage that runs one step ahead over one that does not."""
    ahead, plain = (OurLoop(models, streams=streams, ahead=each, leader_s=LEADER_S) for each in (True, False))
    pairs = taken_in_turn(ahead.run, plain.run, rounds=min(rounds, 2))
    return Row.of_pairs(
        f"a step ahead, {streams} stream{'s' * (streams > 1)}",
        [(streams / mine, streams / other) for mine, other in pairs],
        unit="tokens/s",
        inverse=True,
        equal=ahead.tokens == plain.tokens,
        note=f"theirs: ours without; the leader takes {LEADER_S * 1000:.0f} ms between steps",
    )


class OurLoop:
    """Sequences on a stage that is the whole model; without `ahead` it computes a step when it is asked for, no sooner. The
    leader takes `leader_s` from an answer to the next step."""

    def __init__(self, models: Thin, *, streams: int = 1, ahead: bool = False, leader_s: float = 0.0) -> None:
        self._worker = StageWorker(models.ours, epoch=0, ahead=ahead)
        self._leader_s = leader_s
        self._streams = streams
        self._ids = itertools.count()
        self.tokens: list[list[int]] = []

    def run(self) -> float:
        """Seconds per step after the first."""
        ids = tuple(next(self._ids) for _ in range(self._streams))
        greedy = SamplingParams(temperature=0.0)
        begin = tuple(SequenceStart(seq_id=each, prompt_tokens=len(PROMPT), sampling=greedy) for each in ids)
        prompts = [(*PROMPT[:-1], PROMPT[-1] + stream) for stream in range(self._streams)]
        self.tokens = [self._step(ids, prompts, 0, begin)]

        def decode() -> None:
            for position in range(len(PROMPT), len(PROMPT) + TOKENS - 1):
                self.tokens.append(self._step(ids, [[token] for token in self.tokens[-1]], position))

        taken_s = seconds(decode)
        self._worker.execute(Step(epoch=0, step_id=0, segments=(), tokens=np.zeros(0, np.int32), free=ids))
        return taken_s / (TOKENS - 1)

    def _step(
        self, ids: Sequence[int], tokens: Sequence[Sequence[int]], offset: int, begin: tuple[SequenceStart, ...] = ()
    ) -> list[int]:
        segments = tuple(
            Segment(seq_id=each, offset=offset, length=len(own), sample=True)
            for each, own in zip(ids, tokens, strict=True)
        )
        step = Step(epoch=0, step_id=0, segments=segments, tokens=np.concatenate(tokens).astype(np.int32), begin=begin)
        answer: Any = self._worker.execute(step)
        self._worker.run_ahead()
        time.sleep(self._leader_s)
        return [int(sampled.token_id) for sampled in answer.sampled]


class TheirLoop:
    """mlx-lm's own loop, which enqueues a step before it reads the token of the one before."""

    def __init__(self, models: Thin) -> None:
        self._model = models.theirs
        self.tokens: list[int] = []

    def run(self) -> float:
        """Seconds per token after the first."""
        from mlx_lm.generate import generate_step

        steps = generate_step(mx.array(PROMPT), self._model, max_tokens=TOKENS)
        self.tokens = [int(next(steps)[0])]
        taken_s = seconds(lambda: self.tokens.extend(int(token) for token, _ in steps))
        return taken_s / (TOKENS - 1)


def step_of(models: Thin, *, ours: bool, piece_layers: int = 0) -> Callable[[], mx.array]:
    """Builds the graph of one more token, up to its logits, after a prompt. Ours begins with `piece_layers` layers while it
    builds those after them; 0: nothing of it runs yet."""
    if ours:
        models.ours.piece_layers = piece_layers
        caches = models.ours.make_cache()
        mx.eval(models.ours.forward_ragged(mx.array(PROMPT), [(len(PROMPT), caches)]))
        return lambda: models.ours.logits(models.ours.forward_ragged(mx.array([5]), [(1, caches)]))
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(models.theirs)
    mx.eval(models.theirs(mx.array([PROMPT]), cache))
    return lambda: models.theirs(mx.array([[5]]), cache)[:, -1]


def step_s(models: Thin, *, ours: bool) -> float:
    """Seconds of a step, built and evaluated: the least of a few."""
    build = step_of(models, ours=ours, piece_layers=PIECE_LAYERS)
    return min(seconds(lambda: mx.eval(build())) for _ in range(5))


def graph_s(models: Thin, *, ours: bool) -> float:
    """Seconds that Python takes for the graph of a step: the least of a few."""
    build = step_of(models, ours=ours)
    times, graphs = [], []
    for _ in range(5):
        times.append(seconds(lambda: graphs.append(build())))
        mx.eval(graphs.pop())
    return min(times)


def counts(models: Thin) -> tuple[Row, Row]:
    """Primitives of a step, and kernels that a GPU would be given."""
    figures = [sum(primitives(step_of(models, ours=ours)()).values()) for ours in (True, False)]
    with one_kernel_each():
        figures += [dispatches(step_of(models, ours=ours)()) for ours in (True, False)]
    every = _count("primitives per token", *figures[:2], bar=0.7)
    return every, _count("dispatches per token, as on a GPU", *figures[2:])


def _count(name: str, ours: int, theirs: int, *, bar: float | None = None) -> Row:
    return Row(
        name=name, ours=ours, theirs=theirs, unit="primitives", ratio=ours / theirs, bar=bar, direction="at most"
    )


if __name__ == "__main__":
    sys.exit(main())
