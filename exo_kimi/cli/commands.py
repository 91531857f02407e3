"""The commands, each a call of one room's function; they know nothing of how things work.

Frameworks are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from exo_kimi.cli import exo_commands, train_commands
from exo_kimi.cli.output import write_text

Command = Callable[[argparse.Namespace], int]


def _demo(arguments: argparse.Namespace) -> int:
    from exo_kimi.client.demo import demo

    demo(stages=arguments.stages, host=arguments.host, port=arguments.port, once=arguments.once)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from exo_kimi.serve.launch import ServeOptions, serve

    _log_to_stderr()
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    serve(ServeOptions(**options))
    return 0


def _stage(arguments: argparse.Namespace) -> int:
    from exo_kimi.runtime.stage.process import serve_stage

    _log_to_stderr()
    key = os.environ.get("EXO_KIMI_KEY")
    serve_stage(arguments.listen, model=arguments.model, key_file=arguments.key_file, environment_key=key)
    return 0


def _tiny(arguments: argparse.Namespace) -> int:
    from exo_kimi.checkpoint.tiny.make import make_tiny

    path = make_tiny(
        arguments.directory,
        layout=arguments.layout,
        recipe=arguments.recipe,
        seed=arguments.seed,
        absorbed=arguments.absorbed,
        prefix=arguments.prefix,
        shards=arguments.shards,
    )
    print(f"a tiny Kimi K2 ({arguments.layout}) is in {path}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from exo_kimi.checkpoint.doctor.report import inspect

    report = inspect(arguments.directory)
    print(report.to_json() if arguments.json else report.to_text())
    return 1 if report.problems else 0


def _chat(arguments: argparse.Namespace) -> int:
    from exo_kimi.client.terminal import chat

    chat(arguments.url, model=arguments.model, api_key=arguments.api_key, system=arguments.system)
    return 0


def _layer(arguments: argparse.Namespace) -> int:
    from exo_kimi.runtime.loading.single_layer import run_layer

    print(run_layer(arguments.directory, arguments.layer, tokens=arguments.tokens, dtype=arguments.dtype).to_text())
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from exo_kimi.planner.command import plan_answer

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "output", "svg")}
    answer = plan_answer(**options)
    print(answer.text)
    if arguments.output:
        write_text(arguments.output, answer.plan.to_json(), option="-o")
    if arguments.svg:
        write_text(arguments.svg, answer.svg, option="--svg")
    return 0


def _machine(arguments: argparse.Namespace) -> int:
    from exo_kimi.planner.machines.local import local_profile
    from exo_kimi.planner.machines.profile_text import profile_answer, profile_toml

    if arguments.link:
        return _link(arguments.link)
    if arguments.measure:
        from exo_kimi.bench.claims.machine import measure
    table = measure() if arguments.measure else local_profile()
    print(profile_answer(table), end="")
    if arguments.output:
        write_text(arguments.output, profile_toml(table), option="-o")
    return 0


def _link(address: str) -> int:
    from exo_kimi.bench.claims.link_speed import main

    main([address])
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from exo_kimi.checkpoint.doctor.doctor import doctor
    from exo_kimi.checkpoint.doctor.repair import repair

    diagnosis = (repair if arguments.fix else doctor)(arguments.directory, deep=arguments.deep)
    print(diagnosis.to_json() if arguments.json else diagnosis.to_text())
    return 0 if diagnosis.healthy else 1


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers and nodes that it started end with it
    module = "all" if arguments.name == "all" else f"claims.{arguments.name.replace('-', '_')}"
    status = import_module(f"exo_kimi.bench.{module}").main(arguments.rest)
    return int(status or 0)


def _log_to_stderr() -> None:
    """For the commands that stay: what happened to the stages, with the time, apart from what they print."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


COMMANDS: dict[str, Command] = {
    "demo": _demo,
    "tiny": _tiny,
    "inspect": _inspect,
    "serve": _serve,
    "stage": _stage,
    "chat": _chat,
    "layer": _layer,
    "plan": _plan,
    "machine": _machine,
    "doctor": _doctor,
    "bench": _bench,
    **train_commands.COMMANDS,
    **exo_commands.COMMANDS,
}
