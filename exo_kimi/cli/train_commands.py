"""The commands of `exo-kimi train` and `exo-kimi eval`: a small Kimi K2 from scratch, and what a checkpoint knows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def _tiny(arguments: argparse.Namespace) -> int:
    from exo_kimi.train.command import train_tiny
    from exo_kimi.train.recipe import Recipe

    options = ("steps", "matrices", "aware_share")
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    print(train_tiny(arguments.directory, Recipe(seed=arguments.seed, **given)).to_text())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from exo_kimi.train.compare import compare

    print(compare(arguments.steps, arguments.rates, range(arguments.seeds)).to_text())
    return 0


def _requantize(arguments: argparse.Namespace) -> int:
    from exo_kimi.train.export import requantize

    requantize(arguments.directory, arguments.output, recipe=arguments.recipe)
    print(f"{arguments.recipe} is in {arguments.output}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from exo_kimi.train.evaluation.evaluate import evaluate

    options = {"against": arguments.against, "count": arguments.count, "seed": arguments.seed}
    report = evaluate(arguments.directory, say=lambda text: print(text, file=sys.stderr), **options)
    print(report.to_text(arguments.wrong))
    print(report.to_json())
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train tiny": _tiny,
    "train compare": _compare,
    "train requantize": _requantize,
    "eval": _eval,
}
