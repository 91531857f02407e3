"""The commands of `exo-kimi exo` and `exo-legacy`: a running exo seen, planned for, placed on, and started with our engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


def _status(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.control.command import status

    print(status(arguments.url), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.control.command import plan

    print(plan(**_options(arguments)), end="")
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.control.command import apply

    print(apply(**_options(arguments), echo=partial(print, file=sys.stderr, flush=True)), end="")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.control.command import make_directory

    print(make_directory(**_options(arguments)), end="")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.runner.launch import run
    from exo_kimi.plugin.runner.options import EngineOptions

    rest = arguments.rest[1:] if arguments.rest[:1] == ["--"] else arguments.rest
    names = ("context", "kv_bytes", "prefix_cache_bytes")
    run(rest, options=EngineOptions(**{name: getattr(arguments, name) for name in names}))
    return 0


def _legacy(arguments: argparse.Namespace) -> int:
    from exo_kimi.plugin.legacy.launch import run
    from exo_kimi.plugin.legacy.setup import LegacyOptions

    options = _options(arguments)
    rest = options.pop("rest")
    run(LegacyOptions(**options), rest[1:] if rest[:1] == ["--"] else rest)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "command"}


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "exo status": _status,
    "exo plan": _plan,
    "exo apply": _apply,
    "exo prepare": _prepare,
    "exo run": _run,
    "exo-legacy": _legacy,
}
