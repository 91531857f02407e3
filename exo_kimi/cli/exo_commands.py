"""The commands of `exo-kimi exo` and `exo-legacy`: a running exo seen, planned for, placed on, and started with our engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from exo_kimi.cli.output import awake
from exo_kimi.cli.values import (
    DEFAULT_PORT,
    Objective,
    argument,
    byte_count,
    counts,
    flag,
    names,
    one_of,
    option,
    positive,
    seconds,
)
from exo_kimi.errors import UsageError

DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"

Url = Annotated[str, option("--exo", metavar="URL", help=f"any node of the cluster (default {DEFAULT_URL})")]
Fallbacks = Annotated[
    list[Path],
    option(
        "--fallback", metavar="PLAN", help="of another model, placed while the plan's nodes are away; repeat for more"
    ),
]
OurEngine = Annotated[bool, flag("--our-engine", help="for an exo that `exo-kimi exo run` started")]


def status(url: Url = DEFAULT_URL) -> None:
    """Machines, memory, links and instances, from a running exo."""
    from exo_kimi.plugin.control.command import status

    print(status(url), end="")


def plan(
    model: Annotated[str, argument("DIR_OR_ID", "a checkpoint directory, exo's id of one, or a published model")],
    url: Url = DEFAULT_URL,
    model_id: Annotated[
        str | None,
        option("--model-id", metavar="ORG/NAME", help="exo's id (default: made of the directory's name)"),
    ] = None,
    recipe: Annotated[
        str | None, option("--recipe", metavar="RECIPE", help="bits per module, for a published model")
    ] = None,
    context: Annotated[
        int | None,
        option("--context", parser=positive, metavar="N", help="tokens of one sequence (default 40960)"),
    ] = None,
    concurrency: Annotated[
        int, option("--concurrency", parser=positive, metavar="N", help="sequences at once (default 1)")
    ] = 1,
    objective: Annotated[
        Objective, option("--objective", metavar=one_of(Objective), help="what is minimised (default request)")
    ] = "request",
    reserve_bytes: Annotated[
        int, option("--reserve-bytes", parser=byte_count, metavar="SIZE", help="kept free (default 8GiB)")
    ] = 8 << 30,
    raise_limits: Annotated[bool, flag("--raise-limits", help="count on raised wired limits")] = False,
    our_engine: OurEngine = False,
    split: Annotated[
        Sequence[int] | None,
        option("--split", parser=counts, metavar="N,N,...", help="judge this split instead of searching"),
    ] = None,
    nodes: Annotated[
        Sequence[str] | None,
        option("--nodes", parser=names, metavar="A,B,...", help="these nodes, first layers first (default: the best)"),
    ] = None,
    force: Annotated[bool, flag("--force", help="take --split even where a machine is over its limit")] = False,
    output: Annotated[
        Path | None, option("-o", "--output", metavar="PLAN.json", help="write the plan, for `exo apply`")
    ] = None,
) -> None:
    """Our plan for the cluster as exo sees it, exo's own beside it."""
    options: dict[str, Any] = locals()
    from exo_kimi.plugin.control.command import plan

    print(plan(**options), end="")


def apply(
    path: Annotated[Path, argument("PLAN", "a file of `exo plan -o`")],
    url: Url = DEFAULT_URL,
    wait: Annotated[bool, flag("--wait", help="for the nodes, and until it answers")] = False,
    model_id: Annotated[
        str | None, option("--model-id", metavar="ORG/NAME", help="exo's id, where the plan does not say")
    ] = None,
    nodes: Annotated[
        list[str], option("--node", metavar="MACHINE=NODE", help="where names differ; repeat for more")
    ] = [],  # noqa: B006
    tensor: Annotated[
        bool, flag("--tensor", help="tensor parallel over the plan's nodes, on exo's own engine")
    ] = False,
    replace: Annotated[
        bool,
        flag("--replace", help="end what is placed of this model first, if the plan then fits; back when it fails"),
    ] = False,
    force: Annotated[bool, flag("--force", help="place it even where it says that a node is over its limit")] = False,
    our_engine: OurEngine = False,
    connect_s: Annotated[
        float | None,
        option("--connect-s", parser=seconds, metavar="TIME", help="until the nodes have found each other"),
    ] = None,
    keep: Annotated[
        bool, flag("--keep", help="stay, and place it again after sleep, restart or death of a node")
    ] = False,
    fallbacks: Fallbacks = [],  # noqa: B006
) -> None:
    """Place a plan, watch the nodes load, and take it back if that fails."""
    options: dict[str, Any] = {
        name: value for name, value in locals().items() if name not in ("keep", "fallbacks", "echo")
    }
    echo = partial(print, file=sys.stderr, flush=True)
    if fallbacks and not keep:
        raise UsageError("--fallback is for --keep: it is placed while the plan's nodes are away")
    if not keep:
        from exo_kimi.plugin.control.command import apply

        print(apply(**options, echo=echo), end="")
        return
    from exo_kimi.plugin.node.command import keep as stay

    stay(**{name: value for name, value in options.items() if name != "wait"}, fallbacks=fallbacks, echo=echo)


def prepare(
    directory: Annotated[Path, argument("DIR", "a checkpoint")],
    models_dir: Annotated[Path, option("--models-dir", metavar="DIR", help="one of exo's models directories")],
    model_id: Annotated[
        str | None,
        option("--model-id", metavar="ORG/NAME", help="with kimi-k2 in it (default: made of the directory's name)"),
    ] = None,
    layers: Annotated[
        str | None,
        option("--layers", metavar="START:END", help="one node's share, half-open (default: all)"),
    ] = None,
    symbolic: Annotated[bool, flag("--symbolic", help="symbolic links instead of hard ones")] = False,
) -> None:
    """Make the directory that exo will accept, all of a checkpoint or one share."""
    options: dict[str, Any] = locals()
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.plugin.control.command import make_directory

    options["directory"] = weights_directory(directory)
    print(make_directory(**options), end="")


def run(
    rest: Annotated[list[str], argument("-- ARGS", "exo's own arguments")] = [],  # noqa: B006
    context: Annotated[
        int | None,
        option(
            "--context", parser=positive, metavar="N", help="most tokens of one sequence (default: the placed plan's)"
        ),
    ] = None,
    kv_bytes: Annotated[
        int | None,
        option(
            "--kv-bytes", parser=byte_count, metavar="SIZE", help="for the caches of each rank (default: what is free)"
        ),
    ] = None,
    prefix_cache_bytes: Annotated[
        int | None,
        option(
            "--prefix-cache-bytes",
            parser=byte_count,
            metavar="SIZE",
            help="of them for prompts answered before (default: all that is left; 0: none)",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        option(
            "--keep", metavar="PLAN", help="keep this plan placed, after sleep and restarts too; the same on every node"
        ),
    ] = None,
    fallbacks: Fallbacks = [],  # noqa: B006
    no_plan: Annotated[
        bool, flag("--no-plan", help="leave exo's own split to what is placed from its dashboard")
    ] = False,
) -> None:
    """Start exo with our engine inside its runners: exo-kimi exo run -- ARGS."""
    if fallbacks and keep is None:
        raise UsageError("--fallback is for --keep: it is placed while the plan's nodes are away")
    from exo_kimi.plugin.node.command import run
    from exo_kimi.plugin.runner.options import EngineOptions

    options = EngineOptions(context=context, kv_bytes=kv_bytes, prefix_cache_bytes=prefix_cache_bytes)
    with awake():
        run(_without_dashes(rest), options=options, kept=[*([keep] if keep else []), *fallbacks], no_plan=no_plan)


def legacy(
    plan: Annotated[Path, option("--plan", metavar="PLAN", help="a file of `plan -o`, on every node")],
    rest: Annotated[list[str], argument("-- ARGS", "exo's own, with --node-id MACHINE")] = [],  # noqa: B006
    model: Annotated[
        Path | None,
        option("--model", metavar="DIR", help="the checkpoint here, or this node's layers of it (default: exo's own)"),
    ] = None,
    preload: Annotated[bool, flag("--preload", help="load at start, on every node, not on the first prompt")] = False,
    name: Annotated[
        str | None, option("--name", metavar="NAME", help="the model's name in exo's API (default: the plan's)")
    ] = None,
    nodes: Annotated[
        list[str],
        option(
            "--node",
            metavar="MACHINE=NODE_ID",
            help="where exo's --node-id is not the plan's machine; repeat for more",
        ),
    ] = [],  # noqa: B006
    source: Annotated[
        Path | None, option("--source", metavar="DIR", help="a checkout of exo (default: the installed one)")
    ] = None,
    api_host: Annotated[
        str | None,
        option("--api-host", metavar="HOST", help="where exo's API listens (default: exo's, every interface)"),
    ] = None,
    force: Annotated[bool, flag("--force", help="take the plan even where a machine is over its limit")] = False,
) -> None:
    """Start exo 0.0.x with our model and plan: exo-kimi exo-legacy --plan PLAN -- ARGS."""
    options: dict[str, Any] = {name: value for name, value in locals().items() if name != "rest"}
    from exo_kimi.plugin.legacy.launch import run
    from exo_kimi.plugin.legacy.setup import LegacyOptions

    with awake():
        run(LegacyOptions(**options), _without_dashes(rest))


def _without_dashes(rest: Sequence[str]) -> list[str]:
    """The words after `--`, whether or not it was there to begin with."""
    return list(rest[1:] if rest[:1] == ["--"] else rest)
