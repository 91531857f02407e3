"""The typer app: every command in its panel, and a usage mistake as one of our own errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from exo_kimi.cli import (
    cluster_commands,
    commands,
    convert_commands,
    exo_commands,
    expert_commands,
    fetch_commands,
    lora_commands,
    owner_commands,
    page_commands,
    print_version,
    prune_commands,
    trace_commands,
    train_commands,
)
from exo_kimi.errors import UsageError

NAME = "exo-kimi"
SUMMARY = "Moonshot's Kimi K2 on the Macs you own: exact splits, strict loading, an honest server."
START, SERVE, CHECKPOINTS, EXO, WORKSHOP = (
    "Try it",
    "Plan and serve",
    "Look at checkpoints",
    "Inside exo",
    "Measure and train",
)
# Every mistake in the words of a command line: click's class up to typer 0.25, typer's own since.
MISTAKE: Any = typer.BadParameter.__mro__[1]

NAMES_OPTION = "--served-model-name"  # takes several words, as in vLLM

Command = Any  # click's up to typer 0.25, typer's own since


def _version(asked: bool) -> None:
    if asked:
        print_version()
        raise typer.Exit()


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Print the version and exit."),
    ] = False,
) -> None:
    show_help_when_bare(context)


def _group(context: typer.Context) -> None:
    show_help_when_bare(context)


def show_help_when_bare(context: typer.Context) -> None:
    """Help on the standard output and exit status 2 for a group without a command, so that a script notices."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def build_app() -> typer.Typer:
    """Every command and option, as `--help` shows them."""
    app = typer.Typer(
        name=NAME, help=SUMMARY, invoke_without_command=True, rich_markup_mode="rich", pretty_exceptions_enable=False
    )
    app.callback(invoke_without_command=True)(_root)
    passed_on = {"allow_interspersed_args": False}  # what follows is another program's
    for panel, name, function, settings in (
        (START, "demo", commands.demo, {}),
        (START, "chat", commands.chat, {}),
        (SERVE, "pull", fetch_commands.pull, {}),
        (SERVE, "share", fetch_commands.share, {}),
        (SERVE, "plan", commands.plan, {}),
        (SERVE, "machine", commands.machine, {}),
        (SERVE, "serve", commands.serve, {}),
        (SERVE, "stage", commands.stage, {}),
        (SERVE, "ui", page_commands.ui, {}),
        (SERVE, "status", owner_commands.status, {}),
        (SERVE, "logs", owner_commands.service_logs, {}),
        (SERVE, "report", owner_commands.report, {}),
        (SERVE, "verify", owner_commands.verify, {}),
        (CHECKPOINTS, "inspect", commands.inspect, {}),
        (CHECKPOINTS, "doctor", commands.doctor, {}),
        (CHECKPOINTS, "layer", commands.layer, {}),
        (CHECKPOINTS, "convert", convert_commands.convert, {}),
        (CHECKPOINTS, "tiny", commands.tiny, {}),
        (CHECKPOINTS, "calibrate", prune_commands.calibrate, {}),
        (CHECKPOINTS, "prune", prune_commands.prune, {}),
        (CHECKPOINTS, "compare", prune_commands.compare, {}),
        (EXO, "exo-legacy", exo_commands.legacy, passed_on),
        (WORKSHOP, "bench", commands.bench, passed_on),
        (WORKSHOP, "eval", train_commands.evaluate, {}),
    ):
        app.command(name, rich_help_panel=panel, context_settings=settings)(function)

    service = _add_group(app, "service", SERVE, "Start serve, stage or exo at every login, with logs that rotate.")
    service.command("install", context_settings={**passed_on, "ignore_unknown_options": False})(
        owner_commands.service_install
    )
    service.command("status")(owner_commands.service_status)
    service.command("logs")(owner_commands.service_logs)
    service.command("uninstall")(owner_commands.service_uninstall)
    service.command("run", hidden=True)(owner_commands.service_run)

    exo = _add_group(app, "exo", EXO, "Use our plan, our loader and our engine in a running exo 1.x.")
    exo.command("status")(exo_commands.status)
    exo.command("plan")(exo_commands.plan)
    exo.command("apply")(exo_commands.apply)
    exo.command("prepare")(exo_commands.prepare)
    exo.command("run", context_settings=passed_on)(exo_commands.run)

    trace = _add_group(app, "trace", WORKSHOP, "Which experts a workload asks for, and what memory would make of it.")
    trace.command("record")(trace_commands.record)
    trace.command("replay")(trace_commands.replay)
    trace.command("make")(trace_commands.make)

    experts = _add_group(app, "experts", CHECKPOINTS, "Help for a machine that reads experts from disk.")
    experts.command("pack")(expert_commands.pack)

    cluster = _add_group(app, "cluster", SERVE, "The machines that were paired with this one.")
    cluster.command("status")(cluster_commands.status)
    cluster.command("forget")(cluster_commands.forget)

    train = _add_group(app, "train", WORKSHOP, "Train a small Kimi K2 that really answers, on the CPU.")
    train.command("tiny")(train_commands.tiny)
    train.command("draft")(train_commands.draft)
    train.command("grpo")(train_commands.grpo)
    train.command("lora")(lora_commands.lora)
    train.command("compare")(train_commands.compare)
    train.command("requantize")(train_commands.requantize)
    return app


def command_tree() -> Command:
    """The root command with all below it, as typer builds them from the functions."""
    return get_command(build_app())


def run(words: Sequence[str]) -> int:
    """Run the command that the words name; returns its exit status.

    Raises:
        UsageError: the words cannot be read.
        ExoKimiError: what the command raised.
    """
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a file's name, or a model's text, may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command_tree().main(_spread(words), prog_name=NAME, standalone_mode=False)
    except MISTAKE as mistake:
        raise _usage_error(mistake) from None
    return int(status or 0)


def check_words(words: Sequence[str]) -> None:
    """Read a command's words as its command line would, without running it.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        found, rest = command_tree(), _spread(words)
        while hasattr(found, "commands"):
            name = rest.pop(0) if rest else ""
            if name not in found.commands:
                raise UsageError("no such command", found=" ".join(words)[:200], fix=f"see `{NAME} --help`")
            found = found.commands[name]
        found.make_context(f"{NAME} {found.name}", rest)
    except MISTAKE as mistake:
        raise _usage_error(mistake) from None


def _spread(words: Sequence[str]) -> list[str]:
    """`--served-model-name A B` as the parser knows it: the option before each name."""
    spread: list[str] = []
    naming = False
    for word in words:
        if naming and not word.startswith("-") and spread[-1] != NAMES_OPTION:
            spread.append(NAMES_OPTION)
        elif word.startswith("-"):
            naming = word == NAMES_OPTION
        spread.append(word)
    return spread


def _usage_error(mistake: Any) -> UsageError:
    what = " ".join(mistake.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    path = mistake.ctx.command_path if mistake.ctx else NAME
    return UsageError(what[:1].lower() + what[1:], fix=f"see `{path} --help`")


def _add_group(app: typer.Typer, name: str, panel: str, summary: str) -> typer.Typer:
    group = typer.Typer(name=name, help=summary, invoke_without_command=True)
    group.callback(invoke_without_command=True)(_group)
    app.add_typer(group, rich_help_panel=panel)
    return group
