"""The commands that bring weights to this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from exo_kimi.cli.values import argument, flag, layer_range, option, positive

SHARE, FROM, OUTPUT = "Which part", "Where from", "Where to"


def pull(
    model: Annotated[
        str | None,
        argument("ORG/NAME", "a model of the hub, or of its mirror in HF_ENDPOINT; its name here with --from"),
    ] = None,
    address: Annotated[
        str | None,
        option("--from", metavar="ADDR", help="fetch what `exo-kimi share` on another machine has", panel=FROM),
    ] = None,
    key_file: Annotated[
        Path | None,
        option("--key-file", metavar="FILE", help="cluster key for --from (or EXO_KIMI_KEY)", panel=FROM),
    ] = None,
    layers: Annotated[
        Any,  # typer would ask for two words
        option("--layers", parser=layer_range, metavar="START:END", help="this share only, half-open", panel=SHARE),
    ] = None,
    plan: Annotated[
        Path | None, option("--plan", metavar="PLAN.json", help="the share of --machine in this plan", panel=SHARE)
    ] = None,
    machine: Annotated[
        str | None, option("--machine", metavar="NAME", help="this machine's name in --plan", panel=SHARE)
    ] = None,
    no_vision: Annotated[
        bool, flag("--no-vision", help="leave the vision tower out of a share with layer 0", panel=SHARE)
    ] = False,
    whole_files: Annotated[
        bool,
        flag(
            "--whole-files",
            help="never cut a file with layers of the share: more bytes, and every file's SHA-256 is checked",
            panel=SHARE,
        ),
    ] = False,
    revision: Annotated[
        str | None, option("--revision", metavar="REV", help="branch, tag or commit (default: the newest)", panel=FROM)
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "-o", "--output", metavar="DIR", help="default: in EXO_KIMI_MODELS, where its name finds it", panel=OUTPUT
        ),
    ] = None,
    connections: Annotated[
        int, option("--connections", parser=positive, metavar="N", help="requests at a time (default 8)")
    ] = 8,
    dry_run: Annotated[bool, flag("--dry-run", help="say how many bytes would come, and fetch headers only")] = False,
) -> None:
    """Fetch a model, or the share of it that this machine needs; run it again to go on."""
    options: dict[str, Any] = locals()
    from exo_kimi.fetch.command import PullCommand, pull_command

    print(pull_command(PullCommand(**options)))


def share(
    directory: Annotated[Path, argument("DIR", "a checkpoint or a share of one, or ORG/NAME")],
    listen: Annotated[str, option("--listen", metavar="ADDR", help="HOST:PORT to listen on")],
    key_file: Annotated[
        Path | None,
        option("--key-file", metavar="FILE", help="cluster key; made when there is none (or EXO_KIMI_KEY)"),
    ] = None,
) -> None:
    """Give the files of a checkpoint to other machines with the cluster key, for `pull --from ADDR`."""
    from exo_kimi.fetch.command import share_command
    from exo_kimi.fetch.directories import weights_directory

    share_command(weights_directory(directory), listen, key_file=key_file, show_key=sys.stdout.isatty())
