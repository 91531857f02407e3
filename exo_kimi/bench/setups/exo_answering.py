"""One real exo node with its own engine that answers for a checkpoint: exo's column of `bench conformance --peer`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exo_kimi.bench.setups.exo_here import ExoHere
from exo_kimi.bench.setups.exo_nodes import exo_cluster
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines

MODEL = "lab/kimi-k2-tiny"
_CONTEXT = 8192
_DEADLINES = Deadlines(poll_s=0.3, connect_s=90.0, quiet_s=120.0)


@contextlib.contextmanager
def exo_server(exo: ExoHere, checkpoint: Path) -> Iterator[str]:
    """The base URL of exo, with the checkpoint placed on one node under the name `MODEL`.

    Raises:
        ExoError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="exo-answering-") as temporary:
        folder = Path(temporary)
        prepare(checkpoint, folder / "models", model_id=MODEL)
        with exo_cluster(exo, folder / "node", folder / "models", nodes=1) as cluster:
            layers = Checkpoint(checkpoint).config.num_hidden_layers
            with ExoClient(cluster.url) as client:
                plan = exo_plan(
                    client.state(), checkpoint, model_id=MODEL, context=_CONTEXT, split=(layers,), our_engine=False
                ).plan
                apply_plan(client, plan, deadlines=_DEADLINES)
            yield cluster.url
