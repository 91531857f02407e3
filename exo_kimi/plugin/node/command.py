"""`exo-kimi exo apply --keep`, which stays, and `exo-kimi exo run`: exo with our engine, our planner, and what it shall keep."""

from __future__ import annotations

import argparse
import importlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exo_kimi.errors import ExoUnreachableError, UsageError
from exo_kimi.planner.plan import read_plan
from exo_kimi.plugin.control.command import apply, node_pairs
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.watch import Deadlines
from exo_kimi.plugin.node.keeper import Keeper, KeptPlan, Patience
from exo_kimi.plugin.node.record import KeepRecord, default_record
from exo_kimi.plugin.runner import launch
from exo_kimi.plugin.runner.options import EngineOptions

logger = logging.getLogger(__name__)
_API_PORT = 52415
_AFTER_FAULT_S = 30.0
Say = Callable[[str], None]


def keep(
    url: str,
    path: str | Path,
    *,
    fallbacks: Sequence[str | Path] = (),
    model_id: str | None = None,
    nodes: Sequence[str] = (),
    tensor: bool = False,
    replace: bool = False,
    force: bool = False,
    our_engine: bool = False,
    connect_s: float | None = None,
    record: Path | None = None,
    echo: Say = lambda line: None,
) -> None:
    """Place a plan and stay: the body of `exo-kimi exo apply PLAN --keep`. What a person had ended before is placed again.

    Args:
        url: of any node.
        path: the wanted plan.
        fallbacks: plans of other models, for the time while nodes of those before are away.
        model_id: of the wanted plan, where it does not say.
        nodes: `MACHINE=NODE` where names differ; each for the plans that have the machine.
        tensor: refused: exo's own tensor-parallel placement is not kept.
        replace: end what is placed of the wanted model first.
        force: place plans although a machine is over its limit.
        our_engine: exo was started by `exo-kimi exo run`; the plans know, and must agree.
        connect_s: until the nodes have found each other.
        record: file of what a person has ended; the user's own when not given.
        echo: takes a line whenever something happens.

    Raises:
        UsageError, PlanError, ExoPlacementError: plans that cannot be kept.
        ExoKimiError: as `apply`, with `replace`.
    """
    if tensor:
        raise UsageError("--keep keeps a plan's split, and --tensor has none", fix="leave one out")
    kept = kept_plans([path, *fallbacks], model_id=model_id, nodes=nodes, force=force)
    ended = KeepRecord(record or default_record(kept[0].model_id))
    for each in kept:
        ended.set_resting(each.model_id, False)
    deadlines = Deadlines() if connect_s is None else Deadlines(connect_s=connect_s)
    with ExoClient(url) as client:
        keeper = Keeper(client, kept, record=ended, say=echo, member=False, at_once=True, deadlines=deadlines)
        if replace:
            options: dict[str, Any] = {"our_engine": our_engine, "connect_s": connect_s, "force": force}
            echo(apply(url, path, model_id=model_id, nodes=nodes, replace=True, echo=echo, **options))
        echo(f"keeping {kept[0].model_id} placed; Ctrl-C ends the keeping, and the model stays")
        keeper.run()


def kept_plans(
    paths: Sequence[str | Path], *, model_id: str | None = None, nodes: Sequence[str] = (), force: bool = False
) -> list[KeptPlan]:
    """The wanted plan and its fallbacks, from their files.

    Raises:
        UsageError, PlanError, ExoPlacementError: one cannot be read or kept.
    """
    plans = [read_plan(path) for path in paths]
    pairs = node_pairs(nodes)
    machines = {stage.machine for plan in plans for stage in plan.stages}
    if strangers := sorted(set(pairs) - machines):
        raise UsageError(
            f"{strangers[0]} is no machine of a plan", expected=", ".join(sorted(machines)), where="--node"
        )
    return [
        KeptPlan.of(
            plan,
            model_id=None if index else model_id,
            nodes={stage.machine: pairs[stage.machine] for stage in plan.stages if stage.machine in pairs},
            force=force,
        )
        for index, plan in enumerate(plans)
    ]


def run(
    arguments: Sequence[str],
    *,
    options: EngineOptions,
    kept: Sequence[Path] = (),
    no_plan: bool = False,
    say: Say = print,
) -> None:
    """Start exo in this process: the body of `exo-kimi exo run -- ARGS`.

    Args:
        arguments: exo's own.
        options: of our engine.
        kept: files of the plan to keep placed, and of its fallbacks.
        no_plan: leave what is placed by exo's own doors to exo's split.
        say: takes lines for the user.

    Raises:
        UsageError, PlanError: a plan cannot be kept.
        ExoVersionError: no exo 1.x is installed beside exo-kimi.
    """
    from exo_kimi.plugin.node.placement import bind_planner

    plans = kept_plans(kept)
    url = None
    if plans:
        url = _url_of(arguments)
        KeepRecord(default_record(plans[0].model_id))  # a file that cannot be read is told before exo starts

    def begin(bound: bool) -> None:
        if bound and not no_plan:
            bind_planner(plans, say)
        if url is not None:
            say(f"exo-kimi: keeps {plans[0].model_id} placed")
            keep_beside(url, plans)

    launch.run(arguments, options=options, say=say, begin=begin)


def keep_beside(
    url: str,
    plans: Sequence[KeptPlan],
    *,
    record: Path | None = None,
    patience: Patience | None = None,
    until: Callable[[], bool] = lambda: False,
) -> threading.Thread:
    """Keep plans placed from a thread of an exo node's process; what it does is in exo's log.

    Args:
        url: of this node's API, which need not answer yet.
        plans: the wanted one and its fallbacks.
        record: file of what a person has ended; the user's own when not given.
        patience: seconds that the keeper waits.
        until: ends the keeping when it is true; else it ends with the process.
    """
    path = record or default_record(plans[0].model_id)

    def body() -> None:
        with ExoClient(url) as client:
            _wait_for(client)
            while not until():
                keeper = Keeper(
                    client, plans, record=KeepRecord(path), say=tell_exos_log, member=True, patience=patience
                )
                try:
                    keeper.run(until)
                except Exception:  # the edge of the thread: a fault of ours must not end the keeping
                    logger.exception("the keeper failed, and begins anew")
                    time.sleep(_AFTER_FAULT_S)

    thread = threading.Thread(target=body, name="exo-kimi-keeper", daemon=True)
    thread.start()
    return thread


def tell_exos_log(line: str) -> None:
    """A line for exo's log, which is the log of this process."""
    exos: Any = importlib.import_module("loguru")
    exos.logger.info(f"exo-kimi: {line}")


def _wait_for(client: ExoClient) -> None:
    while True:
        try:
            client.node_id()
            return
        except ExoUnreachableError:
            time.sleep(1.0)


def _url_of(arguments: Sequence[str]) -> str:
    """Where exo's API of this node will listen, by exo's own arguments."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--api-port", type=int, default=_API_PORT)
    parser.add_argument("--no-api", action="store_true")
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError("cannot read exo's arguments", found=error) from None
    if known.no_api:
        raise UsageError("--keep asks this node's API, and --no-api leaves it out", fix="leave one out")
    return f"http://127.0.0.1:{known.api_port}"
