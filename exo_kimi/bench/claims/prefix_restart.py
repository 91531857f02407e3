"""A known prompt after a restart of the server, from the stages' disks, against the same prompt when it was new.

    exo-kimi bench prefix-restart [--tokens N] [--rounds N]

In each round the server is started anew, answers the prompt of the round before from disk, and then a new one. In the end two
blocks are damaged on disk, one cut short and one with a flipped bit. The ratio is cold over restarted, for the same prompt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from exo_kimi.bench.frame import Result, Row, figure, finish
from exo_kimi.bench.setups.asking import TimedReply, ask, words_of
from exo_kimi.bench.setups.peer import our_server
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError

BAR = 10.0
NEW_TOKENS = 4
BLOCK_TOKENS = 256
WRITE_S = 60.0
BUDGET = "1GB"
TOY = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 1,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


def run(*, tokens: int, rounds: int) -> Result:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        checkpoint = make_tiny(Path(folder) / "toy", recipe="plain", config=TOY, absorbed=True, dtype="F32")
        disk = Path(folder) / "prefixes"
        options = ("--prefix-disk-bytes", BUDGET, "--prefix-dir", str(disk))
        tokenizer = KimiTokenizer.from_directory(checkpoint)
        prompts = [words_of(tokenizer, tokens, seed=seed) for seed in range(rounds)]
        cold: list[TimedReply] = []
        warm: list[TimedReply] = []
        for turn in range(rounds + 1):
            with our_server(checkpoint, *options) as url:
                if turn:
                    warm.append(ask(url, prompts[turn - 1], max_tokens=NEW_TOKENS))
                if turn < rounds:
                    cold.append(ask(url, prompts[turn], max_tokens=NEW_TOKENS))
                    _wait_written(url, sum(answer.prompt_tokens // BLOCK_TOKENS for answer in cold))
        disk_bytes = sum(file.stat().st_size for file in disk.rglob("*.safetensors"))
        _damage(disk, blocks=warm[-1].cached_tokens // BLOCK_TOKENS)
        with our_server(checkpoint, *options) as url:
            damaged = ask(url, prompts[-1], max_tokens=NEW_TOKENS)
    count = cold[0].prompt_tokens
    pairs = [(after.seconds, before.seconds) for after, before in zip(warm, cold, strict=True)]
    equal = all(after.text == before.text for after, before in zip(warm, cold, strict=True))
    share = f"{min(answer.cached_tokens for answer in warm)} of {count} tokens cached"
    size = f"{figure(disk_bytes / rounds, 'bytes')} on disk for each prompt"
    rows = [
        Row.of_pairs(f"{count} tokens after a restart", pairs, unit="s", bar=BAR, equal=equal, note=f"{share}, {size}"),
        Row.of_pairs(
            "with a cut and a flipped block",
            [(damaged.seconds, cold[-1].seconds)],
            unit="s",
            equal=damaged.text == cold[-1].text and damaged.cached_tokens < warm[-1].cached_tokens,
            note=f"{damaged.cached_tokens} tokens cached, the rest computed again",
        ),
    ]
    note = f"{NEW_TOKENS} tokens generated; 2 layers of 1 head, fp32, 2 stages; `theirs` is our cold answer to it"
    return Result(bench="prefix-restart", against="a cold prefill", rows=rows, notes=[note])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench prefix-restart", description="a known prompt after a restart of the server"
    )
    parser.add_argument("--tokens", type=int, default=20480, help="of a prompt (default 20480)")
    parser.add_argument("--rounds", type=int, default=2, help="restarts that count (default 2)")
    options = parser.parse_args(argv)
    return finish(run(tokens=options.tokens, rounds=options.rounds), options)


def _wait_written(url: str, blocks: int) -> None:
    deadline_s = time.monotonic() + WRITE_S
    while time.monotonic() < deadline_s:
        lines = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text.splitlines()
        if any(line.startswith("exo_kimi_prefix_disk_blocks ") and float(line.split()[1]) >= blocks for line in lines):
            return
        time.sleep(0.05)
    raise UsageError("the stages did not write their blocks", expected=f"{blocks} blocks in {WRITE_S:g} s")


def _damage(disk: Path, *, blocks: int) -> None:
    """Of the prompt that was read last, cut short the block at nine tenths on one stage, and flip a bit a little behind
    it on the other. Files that were read have that as their time."""
    for stage, position in enumerate((0.9, 0.95)):
        directory = sorted(disk.iterdir())[stage]
        files = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns)[-blocks:]
        file = files[int(blocks * position)]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data if stage else data[:-1])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(str(error))
