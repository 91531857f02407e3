"""The commands of `exo-kimi cluster`: which machines were paired."""

from __future__ import annotations

from typing import Annotated

from exo_kimi.cli.values import argument


def status() -> None:
    """The machines that this one was paired with, and which of them answer."""
    from exo_kimi.pairing.command import cluster_status

    print(cluster_status())


def forget(
    name: Annotated[
        str | None, argument("NAME", "a paired machine (default: all of them, and the cluster key)")
    ] = None,
) -> None:
    """Forget a paired machine, or all of them and the cluster key."""
    from exo_kimi.pairing.command import cluster_forget

    print(cluster_forget(name))
