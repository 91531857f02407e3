"""Clients of a soak: they ask, read, leave in the middle or do not read at all, and judge every answer.

An answer is right (the words that the same question had before any trouble), told (an error that says what happened), or one of
the three that may not be: wrong (unless `ties` proves that a tie went the other way), hung, and unclear (the connection broke
although nobody had touched the server).
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

CHAT = "/v1/chat/completions"
ANSWER_S = 60.0
SEED = 1  # of every draw
TEMPERATURES = (0.0, 0.7, 1.3)
Kind = Literal["whole", "stream", "leave"]
_WORDS = ("river", "seven", "lamp", "north", "apple", "quiet", "engine", "letter", "moon", "stone", "paper", "glass")


@dataclass(frozen=True, slots=True)
class SoakPrompt:
    """What is asked, for how many tokens, and how hot."""

    text: str
    max_tokens: int
    temperature: float = 0.0

    def body(self, *, stream: bool) -> dict[str, Any]:
        """As the API reads it; greedy or with a seed, so that there is one right answer."""
        return {
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": SEED,
            "stream": stream,
        }


def questions(count: int, generator: random.Random, *, longest_tokens: int = 48) -> list[SoakPrompt]:
    """Short and long ones, some with a common beginning, so that prefixes are shared and stored; greedy and not."""
    made = []
    for number in range(count):
        words = " ".join(generator.choice(_WORDS) for _ in range(generator.choice((3, 12, 60))))
        shared = "You are careful and answer in one sentence. " * 8 if number % 3 == 0 else ""
        tokens = generator.choice((4, 16, longest_tokens))
        made.append(SoakPrompt(f"{shared}{number}: {words}", tokens, TEMPERATURES[number % len(TEMPERATURES)]))
    return made


@dataclass(frozen=True, slots=True)
class Wrong:
    """Another answer than the one before any trouble."""

    question: SoakPrompt
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class SoakVerdict:
    """What an answer was, and what was seen when it may not be."""

    kind: Literal["right", "told", "left", "wrong", "hung", "unclear"]
    detail: str = ""
    wrong: Wrong | None = None


def ask(client: httpx.Client, question: SoakPrompt, expected: str | None, *, kind: Kind) -> SoakVerdict:
    """Ask once and judge.

    Args:
        client: to the server.
        question: what to ask.
        expected: its right answer; None takes any, and `detail` has it.
        kind: read the answer at once, as it comes, or leave after its first events.
    """
    until_s = time.monotonic() + ANSWER_S
    content = b""
    try:
        with client.stream("POST", CHAT, json=question.body(stream=kind != "whole")) as answer:
            for part in answer.iter_bytes():
                content += part
                if time.monotonic() > until_s:
                    return SoakVerdict("hung", content[-200:].decode(errors="replace"))
                if kind == "leave" and content.count(b"data: ") >= 3:
                    return SoakVerdict("left")
    except httpx.TimeoutException as error:
        return SoakVerdict("hung", repr(error))
    except httpx.HTTPError as error:
        return SoakVerdict("unclear", repr(error))
    if answer.status_code != 200:
        return _told(answer.status_code, content)
    found, broken = _whole(content) if kind == "whole" else _streamed(content)
    if broken is not None:
        return SoakVerdict("told", broken) if broken else SoakVerdict("unclear", f"the stream broke off: {found!r}")
    if expected is not None and found != expected:
        detail = f"{question.text[:40]!r}: {found!r} and not {expected!r}"
        return SoakVerdict("wrong", detail, Wrong(question, expected, found))
    return SoakVerdict("right", found)


def _told(status: int, content: bytes) -> SoakVerdict:
    try:
        error = json.loads(content)["error"]
        return SoakVerdict("told", f"{status} {error['code']}")
    except (ValueError, LookupError, TypeError):
        return SoakVerdict("unclear", f"{status} {content[:200]!r}")


def _whole(content: bytes) -> tuple[str, str | None]:
    return str(json.loads(content)["choices"][0]["message"]["content"]), None


def _streamed(content: bytes) -> tuple[str, str | None]:
    """The text; and the code of the error in it, empty when the stream just stopped, None when it ended as it should."""
    text, finished, done = "", False, False
    for line in content.decode().splitlines():
        data = line.removeprefix("data: ")
        if data == line:
            continue
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return text, str(chunk["error"]["code"])
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            finished = finished or choice["finish_reason"] is not None
    return text, None if finished and done else ""


@dataclass(slots=True)
class Seen:
    """What all clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    last_right_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, verdict: SoakVerdict) -> None:
        """Counts it."""
        with self.lock:
            self.counts[verdict.kind] += 1
            if verdict.wrong is not None:
                self.wrong.append(verdict.wrong)
            if verdict.kind == "told":
                self.told[verdict.detail] += 1
            elif verdict.kind == "right":
                self.last_right_s = time.monotonic()
            elif verdict.kind != "left" and len(self.bad) < 20:
                self.bad.append(f"{verdict.kind}: {verdict.detail}")
                print(f"{time.strftime('%T')} {self.bad[-1]}", file=sys.stderr)

    @property
    def answered(self) -> int:
        """Requests that came to any end."""
        return sum(self.counts.values())


class Clients:
    """Threads that ask until they are stopped.

    Args:
        url: of the server.
        count: threads.
        answers: the right answer of each question.
        seed: of their choices.
    """

    def __init__(self, url: str, count: int, answers: Mapping[SoakPrompt, str], seed: int) -> None:
        self.seen = Seen()
        self._url = url
        self._answers = answers
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {index}"),), daemon=True)
            for index in range(count)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_S)

    def _run(self, generator: random.Random) -> None:
        asked: Sequence[SoakPrompt] = list(self._answers)
        while not self._stop.is_set():
            with httpx.Client(base_url=self._url, timeout=ANSWER_S, trust_env=False) as client:
                for _ in range(generator.randint(1, 20)):
                    question = generator.choice(asked)
                    kind: Kind = generator.choices(("whole", "stream", "leave"), (4, 5, 1))[0]
                    self.seen.add(ask(client, question, self._answers[question], kind=kind))
                    if self._stop.wait(generator.random() * 0.05):
                        return
