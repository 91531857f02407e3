"""Our engine against exo's own, inside the same exo: two nodes, the same checkpoint split in the same place, over exo's API.

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python exo-kimi bench exo [--rounds N] [--tokens N]

Two clusters of two nodes are up at once, one of plain exo and one with our engine in its runners, and the same greedy requests
go to each in turn; the runners of the one that waits are stopped meanwhile. The figure is what a client of exo sees: tokens of
all streams while all of them are being answered, from the last first piece of text to the first last one. No prompt is asked
twice of one cluster, for both keep prompts that they have answered. Our texts are compared with the whole model's in one
process; how many of exo's own differ from it is in the note.

What runs is exo's own Python on Linux, with a stand-in for its Rust networking module; see `exo_here` for the variables. On a
Mac, start exo with and without `exo-kimi exo run` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx

from exo_kimi.bench.claims.pipeline import HEAVY
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.awake import awake
from exo_kimi.bench.setups.exo_here import ExoHere, find_exo
from exo_kimi.bench.setups.exo_nodes import BIND_US, ExoCluster, exo_cluster
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoError, ExoKimiError
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines
from exo_kimi.runtime.loading.loader import load
from exo_kimi.sse import event_data

MODEL = "lab/kimi-k2-heavy"
SPLIT = (5, 4)
CONTEXT = 4096
BAR = 1.5
TOY = "toy"
PROMPT = "Tell me about the sea."
DEADLINES = Deadlines(poll_s=0.3, connect_s=90.0, quiet_s=180.0)
ANSWER_S = 90.0  # exo's own engine may hang when two requests decode


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """One stream: its text, how many tokens that was, and when each piece of it came."""

    prompt: str
    text: str
    tokens: int
    times: tuple[float, ...]

    def tokens_between(self, start_s: float, end_s: float) -> float:
        """A piece is mostly a token; where it is more, the tokens are taken to be spread evenly over the pieces."""
        return sum(start_s < time_s <= end_s for time_s in self.times) * self.tokens / len(self.times)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReplies:
    """What one cluster gave to all streams of a round."""

    streams: tuple[ChatReply, ...]

    @property
    def tokens_per_s(self) -> float:
        start_s, end_s = max(each.times[0] for each in self.streams), min(each.times[-1] for each in self.streams)
        return sum(each.tokens_between(start_s, end_s) for each in self.streams) / (end_s - start_s)


class Oracle:
    """What the whole model says in this process, token by token.

    Args:
        directory: the checkpoint.
        tokens: of every answer at most.
    """

    def __init__(self, directory: Path, tokens: int) -> None:
        self._speaker, self._model = Speaker.from_directory(directory), load(directory)
        self._tokens = tokens
        self._said: dict[str, str] = {}

    def differing(self, rounds: Sequence[ChatReplies]) -> int:
        """How many texts are others. A character that the last token leaves unfinished counts for nothing."""
        answers = [answer for each in rounds for answer in each.streams]
        return sum(answer.text.rstrip("\ufffd") != self._says(answer.prompt) for answer in answers)

    def _says(self, prompt: str) -> str:
        if prompt not in self._said:
            cache = self._model.make_cache()
            found: list[int] = []
            ids = self._speaker.template.render([{"role": "user", "content": prompt}]).ids
            while len(found) < self._tokens:
                token = int(mx.argmax(self._model(mx.array([ids]), cache)[0, -1]).tolist())  # type: ignore[arg-type]
                if token in self._speaker.tokenizer.stop_ids:
                    break
                found.append(token)
                ids = [token]
            self._said[prompt] = self._speaker.tokenizer.decode(found).rstrip("\ufffd")
        return self._said[prompt]


def run(*, rounds: int, tokens: int) -> Result:
    """A row for one stream and one for two; skipped where no exo can be started."""
    exo = find_exo()
    reason = exo if isinstance(exo, str) else exo.cannot_import_us()
    if isinstance(exo, str) or reason:
        return Result(bench="exo", skipped=reason)
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="exo-bench-") as folder,
        _clusters(exo, Path(folder)) as (ours, theirs),
        awake(),
    ):
        oracle = Oracle(Path(folder) / TOY, tokens)
        for streams, pairs_of, bar in ((1, 1, None), (2, rounds, BAR)):
            pairs = taken_in_turn(
                _asking(ours, theirs, streams, tokens), _asking(theirs, ours, streams, tokens), rounds=pairs_of
            )
            mine, its = zip(*pairs, strict=True)
            rows.append(
                Row.of_pairs(
                    f"{streams} stream{'s' * (streams > 1)}",
                    [(ours_then.tokens_per_s, theirs_then.tokens_per_s) for ours_then, theirs_then in pairs],
                    unit="tokens/s",
                    bar=bar,
                    inverse=True,
                    equal=oracle.differing(mine) == 0,
                    note=f"{tokens} tokens a stream; of exo's own {streams * pairs_of} texts {oracle.differing(its)} differ",
                )
            )
    return Result(bench="exo", against=f"exo's own engine ({_versions(exo)})", rows=rows, notes=_NOTES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench exo", description="our engine against exo's own, inside exo")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs with two streams (default 3)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default 32)")
    options = parser.parse_args(argv)
    return finish(run(rounds=options.rounds, tokens=options.tokens), options)


@contextlib.contextmanager
def _clusters(exo: ExoHere, folder: Path) -> Iterator[tuple[ExoCluster, ExoCluster]]:
    """Ours and theirs, each with the toy placed on its two nodes."""
    # Absorbed, because exo's mlx-lm quantizes a kv_b_proj a second time, after which its tokens would be others.
    toy = make_tiny(folder / TOY, recipe="uniform4", config=HEAVY, absorbed=True, dtype="F32")
    models = folder / "models"
    prepare(toy, models, model_id=MODEL)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(exo_cluster(exo, folder / "ours", models, plugin=BIND_US))
        theirs = stack.enter_context(exo_cluster(exo, folder / "theirs", models))
        for cluster, our_engine in ((ours, True), (theirs, False)):
            with ExoClient(cluster.url) as client:
                plan = exo_plan(
                    client.state(), toy, model_id=MODEL, context=CONTEXT, split=SPLIT, our_engine=our_engine
                ).plan
                apply_plan(client, plan, deadlines=DEADLINES)
        yield ours, theirs


def _asking(cluster: ExoCluster, other: ExoCluster, streams: int, tokens: int) -> Callable[[], ChatReplies]:
    """Rounds: so many prompts at once, other ones each time, while the other cluster's runners rest."""
    rounds = itertools.count()

    def ask() -> ChatReplies:
        turn = next(rounds)
        with _resting(other):
            return ask_all(cluster.url, [f"{turn} {streams} {index}: {PROMPT}" for index in range(streams)], tokens)

    return ask


@contextlib.contextmanager
def _resting(cluster: ExoCluster) -> Iterator[None]:
    runners = [pid for node in cluster.nodes for pid in node.runners()]
    for pid in runners:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in runners:
            os.kill(pid, signal.SIGCONT)


def ask_all(url: str, prompts: Sequence[str], tokens: int) -> ChatReplies:
    """Stream a greedy answer to each prompt, all at once.

    Raises:
        ExoError: one was not answered.
    """
    answers: dict[int, ChatReply] = {}

    def ask(index: int) -> None:
        with contextlib.suppress(httpx.TransportError, ValueError, KeyError):  # told below
            answers[index] = _stream(url, prompts[index], tokens)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) < len(prompts) or not all(len(each.times) > 1 for each in answers.values()):
        raise ExoError("exo did not answer every request", expected=len(prompts), found=len(answers), where=url)
    return ChatReplies(streams=tuple(answers[index] for index in range(len(prompts))))


def _stream(url: str, prompt: str, tokens: int) -> ChatReply:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    text, count, times = "", 0, []
    url = f"{url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=ANSWER_S, trust_env=False) as reply:
        for data in event_data(reply):
            if data == "[DONE]":
                continue
            event = json.loads(data)
            count = (event.get("usage") or {}).get("completion_tokens", count)
            for choice in event["choices"]:
                delta = choice["delta"]
                if piece := f"{delta.get('reasoning_content') or ''}{delta.get('content') or ''}":
                    text += piece
                    times.append(time.perf_counter())
    return ChatReply(prompt=prompt, text=text, tokens=count or tokens, times=tuple(times))


def _versions(exo: ExoHere) -> str:
    return f"checkout {exo.source.name}, mlx {exo.version_of('mlx')}, mlx-lm {exo.version_of('mlx-lm')}"


_NOTES = (
    "heavy toy: 9 layers (5 and 4), D 512, 32 experts top-8 of 512, 4 bits, float32; tokens while all streams are answered,",
    "through exo's API; exo's Python on Linux with a stand-in for its Rust networking",
)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ExoKimiError as error:
        sys.exit(str(error))
