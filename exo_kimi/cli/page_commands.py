"""The command that shows the page where no model is served."""

from __future__ import annotations

from typing import Annotated

from exo_kimi.cli.values import option, port


def ui(
    exo: Annotated[
        str | None,
        option("--exo", metavar="URL", help="show the cluster of a running exo: any of its nodes (http://HOST:52415)"),
    ] = None,
    host: Annotated[
        str, option("--host", metavar="HOST", help="address of the page (default 127.0.0.1: this machine only)")
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", parser=port, metavar="PORT", help="port of the page (default 52416)")
    ] = 52416,
) -> None:
    """The page without a model: the planner, and an exo cluster as it is now. It needs no MLX."""
    from exo_kimi.client.ui import run_ui

    run_ui(
        host=host, port=port, exo=exo, announce=lambda url: print(f"the page is at {url} (Ctrl-C stops)", flush=True)
    )
