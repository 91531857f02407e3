"""How the words of a command line are read: parsers of values, and how an option is declared."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import typer

from exo_kimi.errors import UsageError
from exo_kimi.units import parse_bytes, parse_seconds

MIN_DEADLINE_S = 2.0
MOST_HEAD_DRAFTS = 6  # as of runtime/engine/draft_policy.py
DEFAULT_PORT = 52415

Objective = Literal["request", "latency", "throughput", "ttft"]
Dtype = Literal["float32", "bfloat16", "float16"]
KvBits = Literal[8]
ExpertPolicy = Literal["lru", "slru", "lfu", "s3fifo", "pinned"]
ExpertPrefetch = Literal["auto", "on", "off"]
ExpertReads = Literal["auto", "cached", "direct"]

Value = TypeVar("Value")


def option(
    *names: str,
    help: str | None = None,
    parser: Callable[[Any], Any] | None = None,
    metavar: str | None = None,
    panel: str | None = None,
    envvar: str | None = None,
) -> Any:
    """An option; its help tells the default in words, because many depend on the machine or the model."""
    return typer.Option(
        *names,
        help=help,
        parser=parser,
        metavar=metavar,
        rich_help_panel=panel,
        envvar=envvar,
        show_default=False,
        show_envvar=False,
    )


def one_of(choices: Any) -> str:
    """The metavar of a Literal: `mlx|int4|fp8|bf16`."""
    return "|".join(map(str, get_args(choices)))


def flag(*names: str, help: str, panel: str | None = None) -> Any:
    """An option without a value."""
    return option(*names, help=help, metavar="", panel=panel)


def argument(metavar: str, help: str | None = None, *, parser: Callable[[Any], Any] | None = None) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=help, parser=parser, show_default=False)


def _parser(read: Callable[[str], Value]) -> Callable[[Any], Value]:
    """A parser for typer, which also sends defaults through: they are values already."""

    @wraps(read)
    def parse(given: Any) -> Value:
        return read(given) if isinstance(given, str) else given

    return parse


@_parser
def whole(text: str) -> int:
    """A whole number, negative too."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


@_parser
def layer_or_tower(text: str) -> int | Literal["vision"]:
    """A layer's number, or the word for the tower."""
    return "vision" if text == "vision" else whole(text)


@_parser
def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number of at least 1")
    return int(text)


@_parser
def key(text: str) -> str:
    """An API key that a header can carry."""
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise typer.BadParameter("a key is one or more printable ASCII characters, without space around it")
    return text


@_parser
def counts(text: str) -> list[int]:
    """Layers per stage, such as 44,17."""
    return [positive(part.strip()) for part in text.split(",")]


@_parser
def layer_range(text: str) -> tuple[int, int]:
    """Layers `44:61`, half-open."""
    start, _, end = text.partition(":")
    if not start.isdecimal() or not end.isdecimal() or int(start) >= int(end):
        raise typer.BadParameter(f"{text!r} is not a range of layers such as 44:61 (44 to 60)")
    return int(start), int(end)


@_parser
def names(text: str) -> list[str]:
    """Names of nodes, such as studio,mini."""
    return [part.strip() for part in text.split(",")]


@_parser
def guesses(text: str) -> str | int:
    """`off`, `auto`, or a number of tokens to guess."""
    return text if text in ("off", "auto") else positive(text)


@_parser
def draft_tokens(text: str) -> str | int:
    """`auto`, or a number of guesses of a draft head."""
    if text == "auto" or (text.isdecimal() and int(text) <= MOST_HEAD_DRAFTS):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is not auto or a number from 0 to {MOST_HEAD_DRAFTS}")


@_parser
def host_name(text: str) -> str:
    """A name or an IP address by itself, or `*`; with a scheme or a port it would never be found in a request."""
    plain = text.strip().removeprefix("[").removesuffix("]")
    if not plain or any(each in plain for each in "/@?# ") or (":" in plain and not _is_ip_address(plain)):
        raise typer.BadParameter(f"{text!r} is not a name such as studio.local, without scheme and port, or *")
    return plain


@_parser
def model_name(text: str) -> str:
    """A name of a model, without blanks, as JSON can hold it."""
    if not text or any(each.isspace() for each in text) or not text.isprintable():
        raise typer.BadParameter(f"{text!r} is not a name such as kimi-k2, without blanks")
    return text


@_parser
def origin(text: str) -> str:
    """`https://app.example` or `http://localhost:3000`, as browsers send it, or `*`."""
    scheme, _, rest = text.partition("://")
    if text != "*" and (
        scheme not in ("http", "https", "app", "tauri") or not rest or any(each in rest for each in "/@?# ")
    ):
        raise typer.BadParameter(f"{text!r} is not an origin such as https://app.example, without a path, or *")
    return text


@_parser
def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise typer.BadParameter(f"{text!r} is not a port (0 to 65535)")
    return int(text)


@_parser
def byte_count(text: str) -> int:
    """Bytes of a size such as 512GB."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise typer.BadParameter(f"{text!r} is not a size such as 512GB or 8GiB") from error


@_parser
def byte_rate(text: str) -> float:
    """Bytes per second of a speed such as 6GB/s."""
    try:
        found = parse_bytes(text.strip().removesuffix("/s"))
    except UsageError as error:
        raise typer.BadParameter(f"{text!r} is not a speed such as 6GB/s") from error
    if found < 1:
        raise typer.BadParameter(f"{text!r} is no speed")
    return float(found)


@_parser
def seconds(text: str) -> float:
    """Seconds of a time such as 30s."""
    try:
        return parse_seconds(text)
    except UsageError as error:
        raise typer.BadParameter(f"{text!r} is not a time such as 30s or 2min") from error


@_parser
def deadline(text: str) -> float:
    """Seconds that leave room for a few heartbeats."""
    found = seconds(text)
    if found < MIN_DEADLINE_S:
        raise typer.BadParameter(f"{text!r} is under {MIN_DEADLINE_S:g} s, and heartbeats come once a second")
    return found


@_parser
def real(text: str) -> float:
    """A number of at least 0."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e6:
        raise typer.BadParameter(f"{text!r} is not a number of at least 0")
    return found


@_parser
def share(text: str) -> float:
    """A part of the whole, 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise typer.BadParameter(f"{text!r} is not a share between 0 and 1")
    return found


@_parser
def rates(text: str) -> tuple[float, ...]:
    """Learning rates, such as 0.002,0.004: each above 0 and under 1."""
    found = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0 < rate < 1:
            raise typer.BadParameter(f"{part.strip()!r} is not a learning rate between 0 and 1")
        found.append(rate)
    return tuple(dict.fromkeys(found))


@_parser
def kept_experts(text: str) -> int | Path:
    """A number of experts, or a plan file."""
    return int(text) if text.isdecimal() else Path(text)


@_parser
def layer_list(text: str) -> tuple[int, ...] | int:
    """Layers such as 5,9, or `bi:2` for the two of the least block influence."""
    kind, _, count = text.partition(":")
    if kind == "bi":
        return positive(count)
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is neither layers such as 5,9 nor bi:N")
    return tuple(int(part) for part in text.split(","))


def _is_ip_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
