"""The stable door between exo and exo-kimi: the names that `patches/` and other people's code import, and that stay.

    from exo_kimi.exo import install
    install(print)        # exo 1.x, before its main loop: Kimi models run on exo-kimi's engine

Importing it imports nothing of exo and nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exo_kimi.plugin.legacy.launch import Session

__all__ = ["begin_legacy", "entrypoint", "install"]


def install(say: Callable[[str], None] = print) -> None:
    """Bind our engine into the exo 1.x of this process, if it is one that we know, and say what was done.

    Args:
        say: takes lines for the user.
    """
    from exo_kimi.plugin.runner.launch import install

    install(say)


def entrypoint(bound_instance: Any, event_sender: Any, task_receiver: Any, cancel_receiver: Any, _logger: Any) -> None:
    """Run one of exo's runner processes, with our engine where the model is a Kimi.

    It takes the place of `exo.worker.runner.bootstrap.entrypoint` and has its parameters. A spawned process finds it by name.
    """
    from exo_kimi.plugin.runner.launch import entrypoint

    entrypoint(bound_instance, event_sender, task_receiver, cancel_receiver, _logger)


def begin_legacy() -> Session | None:
    """Bind our model, plan and preload hook into exo 0.0.15-alpha as the environment says (`EXO_KIMI_PLAN`).

    Call it before exo parses its arguments, and `attach(globals())` of the result once exo's node is made; None when the
    exo of this process is not one that we know.
    """
    from exo_kimi.plugin.legacy.launch import begin

    return begin()
