"""Short turns on a long history, over HTTP: our server against `mlx_lm.server` with its prompt cache, same weights.

    python -m exo_kimi.bench.claims.turns [--history N] [--turns N] [--tokens N]

After one request with the history, each turn adds a few tokens to the prompt and asks for one token, of both servers in turn.
Both find the prompt so far in their caches; what differs is what the new tokens cost, and what is around it. The ratio is
theirs over ours, a median over turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.bench.setups.asking import TimedReply, ask, words_of
from exo_kimi.bench.setups.peer import our_server, peer_server
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError

BAR = 2.0
TOY = {  # K2's head sizes, so that 40 tokens cost what they cost there relative to expanding the history
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
Pair = tuple[TimedReply, TimedReply]


def run(*, history: int, turns: int, tokens: int) -> Result:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="turns-") as folder:
        checkpoint = make_tiny(Path(folder) / "toy", recipe="plain", config=TOY, absorbed=True, dtype="F32")
        tokenizer = KimiTokenizer.from_directory(checkpoint)
        with our_server(checkpoint) as ours, peer_server(checkpoint) as theirs:
            prompt = words_of(tokenizer, history, seed=0)
            with ThreadPoolExecutor() as both:  # at once, for it takes long: each keeps one core busy
                first_ours, first_theirs = both.submit(ask, ours, prompt), both.submit(ask, theirs, prompt)
                first = (first_ours.result(), first_theirs.result())
            pairs: list[Pair] = []
            for turn in range(turns + 1):
                prompt += words_of(tokenizer, tokens, seed=1 + turn)
                if turn % 2:
                    answer = ask(theirs, prompt)
                    pairs.append((ask(ours, prompt), answer))
                else:
                    answer = ask(ours, prompt)
                    pairs.append((answer, ask(theirs, prompt)))
    name = f"{turns} turns of {tokens} on {history}"
    rows = [_row("the history, cold, both at once", [first], None), _row(name, pairs[1:], BAR)]
    config = "2 layers, 2 heads of 128+64 and 128, kv_lora 256, fp32; ours with 2 stages, theirs in one process"
    return Result(bench="turns", against=f"mlx_lm.server {version('mlx-lm')}", rows=rows, notes=[config])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench turns", description="turns on a long history, over HTTP")
    parser.add_argument("--history", type=int, default=8192, help="tokens of the history (default 8192)")
    parser.add_argument("--turns", type=int, default=20, help="turns that count (default 20)")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens of a turn (default 40)")
    options = parser.parse_args(argv)
    return finish(run(history=options.history, turns=options.turns, tokens=options.tokens), options)


def _row(name: str, pairs: list[Pair], bar: float | None) -> Row:
    seconds = [(ours.seconds, theirs.seconds) for ours, theirs in pairs]
    cached = [
        (ours.cached_tokens / ours.prompt_tokens, theirs.cached_tokens / theirs.prompt_tokens) for ours, theirs in pairs
    ]
    least = ", ".join(f"{min(shares):.1%}" for shares in zip(*cached, strict=True))
    # mlx-lm's detokenizer drops a space at the very begin of an answer.
    equal = all(
        ours.text.strip() == theirs.text.strip() and ours.prompt_tokens == theirs.prompt_tokens
        for ours, theirs in pairs
    )
    return Row.of_pairs(name, seconds, unit="s", bar=bar, note=f"cached at least: {least}", equal=equal)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(str(error))
