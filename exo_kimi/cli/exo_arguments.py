"""The options of `exo-kimi exo`; it knows nothing of what the commands do."""

from __future__ import annotations

import argparse
from pathlib import Path

from exo_kimi.cli.values import OBJECTIVES, Commands, byte_count, command, counts, positive, seconds

DEFAULT_URL = "http://127.0.0.1:52415"


def add_exo(commands: Commands) -> None:
    """The group and its commands."""
    summary = "use our plan, our loader and our engine in a running exo 1.x"
    group = commands.add_parser("exo", help=summary, description=summary)
    inner = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _with_url(command(inner, "status", "machines, memory, links and instances, from a running exo", room="exo"))
    _add_plan(inner)
    _add_apply(inner)
    _add_prepare(inner)
    _add_run(inner)


def add_exo_legacy(commands: Commands) -> None:
    """exo 0.0.x, which has one command."""
    parser = command(
        commands, "exo-legacy", "start exo 0.0.x with our model and plan: exo-kimi exo-legacy --plan PLAN -- ARGS"
    )
    parser.add_argument("--plan", type=Path, required=True, metavar="PLAN", help="a file of `plan -o`, on every node")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="the checkpoint here, or this node's layers of it (default: exo's own)",
    )
    parser.add_argument("--preload", action="store_true", help="load at start, on every node, not on the first prompt")
    parser.add_argument("--name", help="the model's name in exo's API (default: the plan's)")
    parser.add_argument(
        "--node",
        dest="nodes",
        action="append",
        default=[],
        metavar="MACHINE=NODE_ID",
        help="where exo's --node-id is not the plan's machine",
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkout of exo (default: the installed one)")
    parser.add_argument("--api-host", metavar="HOST", help="where exo's API listens (default: exo's, every interface)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- ARGS", help="exo's own, with --node-id MACHINE")


def _add_plan(commands: Commands) -> None:
    parser = _with_url(
        command(commands, "plan", "our plan for the cluster as exo sees it, exo's own beside it", room="exo")
    )
    parser.add_argument(
        "model", metavar="DIR_OR_ID", help="a checkpoint directory, exo's id of one, or a published model"
    )
    parser.add_argument("--model-id", metavar="ORG/NAME", help="exo's id (default: from the directory's name)")
    parser.add_argument("--recipe", help="bits per module, for a published model")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens of one sequence (default 40960)")
    parser.add_argument("--concurrency", type=positive, default=1, metavar="N", help="sequences at once (default 1)")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="request", help="what is minimised (default request)"
    )
    parser.add_argument(
        "--reserve-bytes", type=byte_count, default=8 << 30, metavar="SIZE", help="kept free (default 8GiB)"
    )
    parser.add_argument("--raise-limits", action="store_true", help="count on raised wired limits")
    parser.add_argument("--our-engine", action="store_true", help="for an exo that `exo-kimi exo run` started")
    parser.add_argument("--split", type=counts, metavar="N,N,...", help="judge this split instead of searching")
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN.json", help="write the plan, for `exo apply`")


def _add_apply(commands: Commands) -> None:
    parser = _with_url(
        command(commands, "apply", "place a plan, watch the nodes load, and take it back if that fails", room="exo")
    )
    parser.add_argument("path", type=Path, metavar="PLAN", help="a file of `exo plan -o`")
    parser.add_argument("--wait", action="store_true", help="until it answers")
    parser.add_argument("--model-id", metavar="ORG/NAME", help="exo's id, where the plan does not say")
    parser.add_argument(
        "--node", dest="nodes", action="append", default=[], metavar="MACHINE=NODE", help="where names differ"
    )
    parser.add_argument(
        "--tensor", action="store_true", help="tensor parallel over the plan's nodes, on exo's own engine"
    )
    parser.add_argument("--replace", action="store_true", help="end what is placed of this model first")
    parser.add_argument("--our-engine", action="store_true", help="for an exo that `exo-kimi exo run` started")
    parser.add_argument("--connect-s", type=seconds, metavar="TIME", help="until the nodes have found each other")


def _add_prepare(commands: Commands) -> None:
    parser = command(
        commands, "prepare", "make the directory that exo will accept, all of a checkpoint or one share", room="exo"
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--models-dir", type=Path, required=True, metavar="DIR", help="one of exo's models directories")
    parser.add_argument(
        "--model-id", metavar="ORG/NAME", help="with kimi-k2 in it (default: from the directory's name)"
    )
    parser.add_argument("--layers", metavar="START:END", help="one node's share, half-open (default: all)")
    parser.add_argument("--symbolic", action="store_true", help="symbolic links instead of hard ones")


def _add_run(commands: Commands) -> None:
    parser = command(
        commands, "run", "start exo with our engine inside its runners: exo-kimi exo run -- ARGS", room="exo"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="most tokens of one sequence (default: the model's)"
    )
    parser.add_argument(
        "--kv-bytes", type=byte_count, metavar="SIZE", help="for the caches of each rank (default: what is free)"
    )
    parser.add_argument(
        "--prefix-cache-bytes",
        type=byte_count,
        metavar="SIZE",
        help="of them for prompts answered before (default: all that is left; 0: none)",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- ARGS", help="exo's own arguments")


def _with_url(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--exo", dest="url", default=DEFAULT_URL, metavar="URL", help=f"any node of the cluster (default {DEFAULT_URL})"
    )
    return parser
