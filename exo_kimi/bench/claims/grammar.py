"""The mask of a constrained reply at Kimi's vocabulary (163,840), for each token, against a step of 45 ms.

    exo-kimi bench grammar [--tokenizer DIRECTORY] [--rounds N]

A grammar is followed between two steps: the leader accepts a token and computes which may come next. Ratios are the median of
that over a step of 45 ms; the bar is 5 %. Without a checkpoint's tokenizer, a made-up vocabulary of the same size is used.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.chat.constraint import json_object, json_schema, strict_tools, tool_call
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.tiny.tokenizer import SPECIAL_TOKENS, write_tokenizer
from exo_kimi.errors import ChatError
from exo_kimi.runtime.requests import TokenConstraint
from exo_kimi.runtime.token_mask import allowed

VOCABULARY = 163_840
STEP_S = 0.045
BAR = 0.05
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"

FLAT = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "number"}, "rain": {"type": "boolean"}},
    "required": ["city", "degrees", "rain"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "kind": {"enum": ["read", "write", "run"]},
                    "why": {"type": "string", "maxLength": 400},
                    "at": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
                },
                "required": ["kind", "why", "at"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["steps"],
    "additionalProperties": False,
}
WRITE = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
    "required": ["path", "content"],
}
FILE = {"path": "a.py", "content": "def main():\n    print('hello, world')  # \"quoted\"\n" * 12}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench grammar", description="the mask of a constrained reply")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY", help="a checkpoint's (default: a made-up one)")
    parser.add_argument("--rounds", type=int, default=3, help="replies for each row (default 3)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = KimiTokenizer.from_directory(options.tokenizer or made_up(Path(folder)))
        began_s = time.perf_counter()
        json_object(tokenizer)
        first_s = time.perf_counter() - began_s
        rows = [_measured(name, tokenizer, make, text, options.rounds) for name, make, text in _cases(tokenizer)]
    notes = [
        f"vocabulary of {tokenizer.vocab_size} ({options.tokenizer or 'made up'}); a step of {STEP_S * 1e3:.0f} ms",
        f"the first constraint of a process takes {first_s:.2f} s: llguidance's view of the vocabulary",
    ]
    return finish(Result(bench="grammar", against="a step of 45 ms", rows=rows, notes=notes), options)


def made_up(directory: Path) -> Path:
    """Tokenizer files with a vocabulary of Kimi's size: bytes, words with and without a blank, numbers, runs, signs."""
    rng = random.Random(0)
    found: dict[bytes, None] = dict.fromkeys(bytes((byte,)) for byte in range(256))

    def add(text: str) -> None:
        raw = text.encode()
        for end in range(2, len(raw) + 1):  # byte pair encoding reaches a token through its beginnings
            found.setdefault(raw[:end])

    for text in ('{"', '":', '",', '"}', '": "', '", "', '"\n', "\n\n", "\n    ", "'])", "();", " == ", "//", "###"):
        add(text)
    for number in range(1000):
        add(str(number))
    for length in range(2, 40):
        add(" " * length)
    most = VOCABULARY - SPECIAL_TOKENS
    while len(found) < most:
        word = "".join(rng.choices(_LETTERS, weights=range(len(_LETTERS), 0, -1), k=rng.randint(2, 9)))
        kind = rng.random()
        add(f" {word}" if kind < 0.5 else word.capitalize() if kind < 0.65 else word)
        if kind > 0.95:
            add("".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 3))))
    write_tokenizer(directory, VOCABULARY, ordinary=list(found)[:most])
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}), encoding="utf-8")
    return directory


def _cases(tokenizer: KimiTokenizer) -> list[tuple[str, Callable[[], TokenConstraint | None], str]]:
    """What is followed: its name, a fresh constraint, and a reply that it allows."""
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": NESTED}} for number in range(25)
    ]
    tools.append({"type": "function", "function": {"name": "write", "parameters": WRITE, "strict": True}})
    steps = [{"kind": "run", "why": "because the tests must pass", "at": "2026-11-27"}] * 8
    call = f"<|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>{_json(FILE)}<|tool_call_end|>"
    section = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    flat = _json({"city": "Oslo, where it rains", "degrees": -4.5, "rain": True})
    return [
        ("any JSON object", lambda: json_object(tokenizer), _json(FILE)),
        ("flat schema", lambda: json_schema(tokenizer, FLAT), flat),
        ("nested schema", lambda: json_schema(tokenizer, NESTED), _json({"steps": steps})),
        ("one of 26 tools", lambda: tool_call(tokenizer, tools), section),
        ("strict tools, free text", lambda: strict_tools(tokenizer, tools), f"Let me write that.{section}"),
    ]


def _measured(
    name: str, tokenizer: KimiTokenizer, make: Callable[[], TokenConstraint | None], text: str, rounds: int
) -> Row:
    began_s = time.perf_counter()
    make()
    compile_s = time.perf_counter() - began_s
    ids = tokenizer.encoding.encode(text, allowed_special="all")
    taken = sorted(second for _ in range(rounds) for second in _followed(make(), ids, tokenizer.vocab_size))
    median_s, slow_s = statistics.median(taken), taken[int(len(taken) * 0.99)]
    return Row(
        name=name,
        ours=median_s,
        unit="s",
        ratio=median_s / STEP_S,
        bar=BAR,
        direction="at most",
        note=f"p99 {slow_s * 1e3:.2f} ms, worst {taken[-1] * 1e3:.1f} ms of {len(ids)} tokens; compiled in {compile_s:.2f} s",
    )


def _followed(constraint: TokenConstraint | None, ids: Sequence[int], vocab_size: int) -> list[float]:
    """Seconds for each token: what the engine does between two steps (`Engine`'s check that something is allowed included)."""
    if constraint is None:
        raise ChatError("nothing is constrained")
    seconds = []
    constraint.mask()
    for token_id in ids:
        began_s = time.perf_counter()
        constraint.accept(token_id)
        mask = constraint.mask()
        if mask is not None:
            allowed(mask, vocab_size).any()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _json(value: Any) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
