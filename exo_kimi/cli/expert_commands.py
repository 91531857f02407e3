"""The commands of `exo-kimi experts`: what helps a machine that reads experts from disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from exo_kimi.cli.values import argument, flag


def pack(
    directory: Annotated[Path, argument("DIR", "a checkpoint")],
    *,
    verify: Annotated[bool, flag("--verify", help="read older records again, and write damaged layers anew")] = False,
) -> None:
    """One aligned record for each expert beside the checkpoint's files, which stay; run it again to go on."""
    from exo_kimi.experts.packed import pack_directory

    print(pack_directory(directory, say=_say, verify=verify))


def _say(text: str) -> None:
    print(text, file=sys.stderr)
