"""How the words of a command line are read; a mistyped one is told in one line."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from exo_kimi.errors import UsageError
from exo_kimi.units import parse_bytes, parse_seconds

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MIN_DEADLINE_S = 2.0
OBJECTIVES = ("request", "latency", "throughput", "ttft")


def command(commands: Commands, name: str, summary: str, *, room: str = "") -> argparse.ArgumentParser:
    """A command; `room` is the group that it is in."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=f"{room} {name}".strip())
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def key(text: str) -> str:
    """An API key that a header can carry."""
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise argparse.ArgumentTypeError("a key is one or more printable ASCII characters, without space around it")
    return text


def counts(text: str) -> list[int]:
    """Layers per stage, such as 44,17."""
    return [positive(part.strip()) for part in text.split(",")]


def guesses(text: str) -> str | int:
    """`off`, `auto`, or a number of tokens to guess."""
    return text if text in ("off", "auto") else positive(text)


def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def byte_count(text: str) -> int:
    """Bytes of a size such as 512GB."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512GB or 8GiB") from error


def seconds(text: str) -> float:
    """Seconds of a time such as 30s."""
    try:
        return parse_seconds(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s or 2min") from error


def deadline(text: str) -> float:
    """Seconds that leave room for a few heartbeats."""
    found = seconds(text)
    if found < MIN_DEADLINE_S:
        raise argparse.ArgumentTypeError(f"{text!r} is under {MIN_DEADLINE_S:g} s, and heartbeats come once a second")
    return found


def share(text: str) -> float:
    """A part of the whole, 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return found


def rates(text: str) -> tuple[float, ...]:
    """Learning rates, such as 0.002,0.004: each above 0 and under 1."""
    found = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0 < rate < 1:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not a learning rate between 0 and 1")
        found.append(rate)
    return tuple(dict.fromkeys(found))
