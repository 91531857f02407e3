"""Speculation from the text's own past: bytes that decoding reads per token, with guesses against without.

Two kinds of rows. `tiny`: a real random model in this process, two stages, answers compared token by token. `K2`: a text replayed
through the real scheduler and guesses, with the bytes of Kimi K2 (4-bit experts, 8-bit rest): an agent that reads a file and
writes it again with changes. Bytes are counted (`planner.weights.bytes`), not timed: on the CPU decoding is not bound by
them. The ratio is bytes without / bytes with, so 1.5 means a third fewer; where text does not repeat it is with / without.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.bench.setups.replay import ReplayPipeline
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.planner.command import model_bytes
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.speculation import Drafter, step_bytes_of
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.pipeline import Pipeline
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel

REPEATING_BAR = 1.5
SAMPLED_BAR = 1.2  # of four words drawn at random, which repeat by chance
RANDOM_BAR = 1.01
NEW = 160
VOCAB = 163_840
FILE = "exo_kimi.planner.search.cost"
UNSEEN = "exo_kimi.planner.search.solver"
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 64, "num_experts_per_tok": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """An answer and what it took: passes that fed generated tokens, and the bytes that they read."""

    tokens: tuple[int, ...]
    steps: int
    read_bytes: float
    accepted: int
    drafted: int


def decode(make: Callable[[], Pipeline], request: GenerationRequest, model: ModelBytes, *, limit: int) -> Decoded:
    """Run one request alone; with a limit of 0 nothing is guessed, only counted."""
    drafter = Drafter(step_bytes=step_bytes_of(model), limit=limit)

    async def run() -> tuple[int, ...]:
        async with (
            Engine(make(), drafter=drafter, prefill_chunk=512) as engine,
            aclosing(engine.generate(request)) as events,
        ):
            return tuple([event.token_id async for event in events])

    tokens = asyncio.run(run())
    counts = drafter.counts
    return Decoded(
        tokens=tokens,
        steps=len(tokens) - counts.accepted,
        read_bytes=counts.read_bytes,
        accepted=counts.accepted,
        drafted=counts.drafted,
    )


def row(name: str, make: Callable[[], Pipeline], request: GenerationRequest, model: ModelBytes, *, bar: float) -> Row:
    """With against without; `bar` is RANDOM_BAR for what does not repeat."""
    repeats = bar != RANDOM_BAR
    ours = decode(make, request, model, limit=8)
    theirs = decode(make, request, model, limit=0)
    tokens = len(theirs.tokens)
    return Row(
        name=name,
        ours=ours.read_bytes / tokens,
        theirs=theirs.read_bytes / tokens,
        unit="bytes",
        ratio=theirs.read_bytes / ours.read_bytes if repeats else ours.read_bytes / theirs.read_bytes,
        bar=bar,
        direction="at least" if repeats else "at most",
        equal=ours.tokens == theirs.tokens,
        note=f"{tokens / ours.steps:.2f} tokens per step, {ours.accepted} of {ours.drafted} guesses right",
    )


def tiny_rows(directory: Path) -> list[Row]:
    """A random model: held to a few words it repeats itself, greedy and sampled; free, at temperature 1, it never does."""
    checkpoint = make_tiny(directory / "tiny", dtype="F32", seed=1, config=SIZES)
    model = model_bytes(directory=checkpoint)

    def make() -> Pipeline:
        def stages() -> Sequence[StageModel]:
            return [load(checkpoint, start, end, dtype="float32") for start, end in pairwise((0, 4, 7))]

        return InlinePipeline(stages, stages=2, context=4096, kv_capacity_tokens=8192, cache_step=256)

    prompt = tuple(random.Random(0).choices(range(400), k=24))
    few = tuple((token, 30.0) for token in prompt[:4])
    samplings = (
        ("tiny, a few words, greedy", SamplingParams(temperature=0.0, logit_bias=few), REPEATING_BAR),
        ("tiny, a few words, temperature 0.5", SamplingParams(temperature=0.5, seed=2, logit_bias=few), SAMPLED_BAR),
        ("tiny, all words, temperature 1", SamplingParams(temperature=1.0, seed=1), RANDOM_BAR),
    )
    return [
        row(
            name,
            make,
            GenerationRequest(request_id=name, prompt_ids=prompt, max_tokens=NEW, sampling=sampling),
            model,
            bar=bar,
        )
        for name, sampling, bar in samplings
    ]


def replay_rows(published: str, recipe: str) -> list[Row]:
    """Texts at K2's size."""
    model = model_bytes(model=published, recipe=recipe)
    source, unseen = (inspect.getsource(import_module(name)) for name in (FILE, UNSEEN))
    edited = re.sub(r"\bmachine\b", "node", source)
    lines = source.splitlines(keepends=True)
    patched = "".join(line for index, line in enumerate(lines) if index % 12) + "# the end\n"
    noise = random.Random(0)
    words = Words()
    head = words.ids("Here is the file, change it and write all of it again.\n" + source)
    scripts = {
        "K2, a file with a name changed": (head, words.ids(edited), REPEATING_BAR),
        "K2, a file with lines left out": (head, words.ids(patched), REPEATING_BAR),
        "K2, another file, not seen": (head, words.ids(unseen), RANDOM_BAR),
        "K2, random ids": (head, [noise.randrange(VOCAB) for _ in range(1500)], RANDOM_BAR),
    }
    return [
        row(
            name,
            lambda script=(*prompt, *answer, 0): ReplayPipeline(script, vocab_size=VOCAB),  # type: ignore[misc]
            GenerationRequest(request_id=name, prompt_ids=tuple(prompt), max_tokens=len(answer)),
            model,
            bar=bar,
        )
        for name, (prompt, answer, bar) in scripts.items()
    ]


class Words:
    """Text as ids of its words, spaces and signs: about as many as a real tokenizer's."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """One id for each."""
        return [self._ids.setdefault(word, len(self._ids)) for word in re.findall(r" ?\w+|\s+|[^\w\s]+", text)]


def run(*, published: str = "kimi-k2-instruct", recipe: str = "int4-q8") -> Result:
    """All rows."""
    with tempfile.TemporaryDirectory() as directory:
        rows = [*tiny_rows(Path(directory)), *replay_rows(published, recipe)]
    return Result(
        bench="speculation",
        against="the same engine without guesses, bytes read by decoding per token",
        rows=rows,
        notes=[f"K2: {published}, {recipe}; words and signs of source files stand for tokens"],
    )


def main(arguments: Sequence[str]) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench speculation", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--model", default="kimi-k2-instruct", help="whose bytes are counted (default kimi-k2-instruct)"
    )
    parser.add_argument("--recipe", default="int4-q8", help="at these bits (default int4-q8)")
    options = parser.parse_args(arguments)
    return finish(run(published=options.model, recipe=options.recipe), options)
