"""Starts exo with our engine in its runners, for Kimi models; everything else of exo stays as it is.

Some names of exo are bound, in this process only and after a check of their signatures: what a runner process runs, what the
worker does next, how the API answers when a Kimi's answer fails, and what it tells of Kimis. `run` does it from outside;
`install` is for an exo that asks for it (`patches/`). Importing this module binds nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from exo_kimi.errors import ExoKimiError, ExoVersionError, UsageError
from exo_kimi.plugin.api.answers import watch_chunks, watch_sending, with_answer_errors
from exo_kimi.plugin.api.cards import (
    with_placed_context,
    with_prepared_card,
    with_prepared_cards,
    with_prepared_cards_71,
    with_shown_context,
)
from exo_kimi.plugin.api.engine_route import with_engine_route
from exo_kimi.plugin.api.reset import with_ended_answers
from exo_kimi.plugin.bindings import (
    API_RESET,
    API_ROUTES,
    API_SETUP,
    BUILDER,
    CHUNK_STREAM,
    FETCH_CARD,
    GET_MODELS,
    HEAD,
    PLAN,
    SEND_GENERATION,
    SHOW_MODEL,
    Name,
    mismatches,
    nearest,
)
from exo_kimi.plugin.runner.beats import RunnerBeat, RunnerReport, RunnerWatch
from exo_kimi.plugin.runner.events import EventTypes, TruthfulSender
from exo_kimi.plugin.runner.options import EngineOptions
from exo_kimi.plugin.runner.worker_plan import WorkerPlan

logger = logging.getLogger(__name__)
PARENT_WATCH_S = 1.0
_PACKAGES = {
    "zmq": "pyzmq",
    "llguidance": "llguidance",
    "tiktoken": "tiktoken",
    "jinja2": "jinja2",
    "json_repair": "json-repair",
}


def run(
    arguments: Sequence[str],
    *,
    options: EngineOptions | None = None,
    say: Callable[[str], None] = print,
    begin: Callable[[bool], None] = lambda bound: None,
) -> None:
    """Start exo in this process, with our engine inside its runners: the body of `exo-kimi exo run -- ARGS`.

    Args:
        arguments: exo's own.
        options: of our engine; what they do not say, this process's environment does.
        say: takes lines for the user.
        begin: called last before exo starts, with whether our engine is bound.

    Raises:
        ExoVersionError: no exo 1.x is installed beside exo-kimi.
    """
    try:
        main = importlib.import_module("exo.main")
    except ImportError as error:
        raise ExoVersionError(
            "no exo 1.x in this Python",
            expected="exo's own environment, with exo-kimi in it",
            found=str(error),
            where=sys.prefix,
            fix="in exo's folder: `uv pip install PATH_OF_EXO_KIMI`, then `uv run exo-kimi exo run -- ARGS`",
        ) from error
    os.environ.update((options or EngineOptions()).to_environment())  # runners inherit it
    begin(install(say))
    sys.argv = ["exo", *arguments]
    main.main()


def install(say: Callable[[str], None]) -> bool:
    """Bind our functions in this node's process if this exo is one that we know, and say what was done.

    Returns:
        Whether they are bound.
    """
    found = bind()
    for line in found or (f"Kimi models run on exo-kimi's engine ({nearest().tested})",):
        say(f"exo-kimi: {line}")
    if found:
        say("exo-kimi: exo is left as it is; its own engine runs every model")
    return not found


def bind() -> tuple[str, ...]:
    """Bind our functions in this node's process.

    Returns:
        What in this exo is not as it was in the tested one, or what our engine lacks here; then nothing is bound.
    """
    exo = nearest()
    found = (*mismatches(exo.node_names), *_lacking())
    if not found:
        setattr(importlib.import_module(exo.entrypoint.module), exo.entrypoint.name, entrypoint)
        for name, wrap in _wrapped():
            _wrap(name, wrap)
        _wrap(exo.refresh_cards, with_prepared_cards if exo is HEAD else with_prepared_cards_71)
    return found


def _wrap(name: Name, wrap: Callable[[Any], Any]) -> None:
    """Bind a function of ours around exo's; once."""
    *path, last = name.name.split(".")
    owner: Any = importlib.import_module(name.module)
    for part in path:
        owner = getattr(owner, part)
    theirs = getattr(owner, last)
    if not hasattr(theirs, "exo_kimi"):
        ours = wrap(theirs)
        ours.exo_kimi = True
        setattr(owner, last, ours)


def _lacking() -> tuple[str, ...]:
    """Why our engine could not start in a runner of this node."""
    missing = sorted(package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None)
    if missing:
        return (f"exo's environment lacks {', '.join(missing)}, which exo-kimi needs",)
    try:
        EngineOptions.from_environment()
    except UsageError as error:
        return (" ".join(str(error).split()),)
    return ()


def entrypoint(bound_instance: Any, event_sender: Any, task_receiver: Any, cancel_receiver: Any, _logger: Any) -> None:
    """What a runner process runs: exo's own, with our builder in place of exo's when the model is a Kimi.

    It is found by its name in the new process, so this module is imported there.
    """
    bootstrap: Any = importlib.import_module("exo.worker.runner.bootstrap")
    bootstrap.logger = _logger  # as exo's entrypoint does first: modules that we import before it take it from there
    reason = _put_builder_in(bound_instance)
    model_id = bound_instance.bound_shard.model_card.model_id
    report = RunnerReport(
        pid=os.getpid(),
        instance_id=str(bound_instance.instance.instance_id),
        model_id=str(model_id),
        rank=bound_instance.bound_shard.device_rank,
        engine="exo-kimi" if reason is None else "exo",
        why=reason,
    )
    beat = RunnerBeat.of_this_runner(report, os.environ)
    if reason is None:
        _pass_on_logs(_logger)
        _end_with_parent()
        _logger.info(f"exo-kimi runs {model_id}")
        event_sender = TruthfulSender(event_sender, model_id, types=EventTypes.installed(), beat=beat)
    else:
        _logger.info(f"exo's own engine runs {model_id}: {reason}")
    bootstrap.entrypoint(bound_instance, event_sender, task_receiver, cancel_receiver, _logger)


def _put_builder_in(bound_instance: Any) -> str | None:
    """Put our builder in this runner, or say why not."""
    from exo_kimi.plugin.runner.assignment import not_ours
    from exo_kimi.plugin.runner.builder import KimiBuilder, model_directory
    from exo_kimi.plugin.runner.engine import KimiEngine

    try:
        reason = not_ours(bound_instance, model_directory(bound_instance.bound_shard.model_card.model_id))
    except ExoKimiError as error:
        return error.what
    if reason is not None:
        return reason
    exo = nearest()
    if found := mismatches(exo.runner_names):
        return "; ".join(found)
    if exo is not HEAD:
        from exo_kimi.plugin.runner.runner71 import put_in

        put_in()
        return None
    base = importlib.import_module("exo.worker.engines.base")
    base.Builder.register(KimiBuilder)
    base.Engine.register(KimiEngine)
    setattr(importlib.import_module(BUILDER.module), BUILDER.name, KimiBuilder)
    return None


def _wrapped() -> tuple[tuple[Name, Callable[[Any], Any]], ...]:
    """The names of exo that are bound to functions around its own. The watch of runners begins with the worker."""
    watch = RunnerWatch()
    return (
        (PLAN, lambda plan: WorkerPlan(plan, begin=lambda: watch.begin(os.environ))),
        (CHUNK_STREAM, watch_chunks),
        (SEND_GENERATION, watch_sending),
        (API_SETUP, with_answer_errors),
        (API_ROUTES, with_engine_route(watch)),
        (API_RESET, with_ended_answers),
        (GET_MODELS, with_placed_context),
        (SHOW_MODEL, with_shown_context),
        (FETCH_CARD, with_prepared_card),
    )


class _ToLoguru(logging.Handler):
    """Our log lines in exo's log."""

    def __init__(self, exo_logger: Any) -> None:
        super().__init__()
        self._exo_logger = exo_logger

    def emit(self, record: logging.LogRecord) -> None:
        self._exo_logger.opt(exception=record.exc_info).log(record.levelname, "{}", record.getMessage())


def _pass_on_logs(exo_logger: Any) -> None:
    ours = logging.getLogger("exo_kimi")
    ours.setLevel(logging.INFO)
    ours.addHandler(_ToLoguru(exo_logger))
    ours.propagate = False


def _end_with_parent() -> None:
    """A runner whose node was killed is found by nobody any more: end it, and free its memory and its port."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, name="exo-kimi-parent-watch", daemon=True).start()
