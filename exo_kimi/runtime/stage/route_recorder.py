"""Which experts the tokens of a running stage are routed to, written down as they come."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from exo_kimi.experts.traces.growing import GrowingTrace
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.moe import MoE

logger = logging.getLogger(__name__)


class RouteRecorder:
    """Hears every choice of a stage's routers. What cannot be written is a warning and ends the recording, and nothing else.

    Args:
        model: of the stage.
        path: of the trace.
    """

    def __init__(self, model: Model, path: Path) -> None:
        self._path = path
        self._pass: list[mx.array] = []
        self._passes: list[list[mx.array]] = []
        self._file: GrowingTrace | None = None
        mixtures = {number: layer.mlp for number, layer in enumerate(model.layers, start=model.start_layer)}
        self._routers = {number: mlp.gate for number, mlp in mixtures.items() if isinstance(mlp, MoE)}
        self._chosen = model.args.num_experts_per_tok
        if not self._routers:
            return
        layers = f"layers {model.start_layer}:{model.end_layer}"
        try:
            self._file = GrowingTrace.open(
                path,
                experts=model.args.n_routed_experts,
                chosen=self._chosen,
                layers=list(self._routers),
                source=f"served by {layers}",
            )
        except OSError as error:
            self._stop(error)
            return
        for index, router in enumerate(self._routers.values()):
            router.on_choice = partial(self._chose, index)

    @property
    def is_recording(self) -> bool:
        """Whether what comes is written."""
        return self._file is not None

    def write(self) -> None:
        """A step is done: write its passes."""
        passes, self._passes, self._pass = self._passes, [], []
        for each in passes:
            rows = [np.array(choice).reshape(-1, self._chosen) for choice in each]
            if self._file is None or len({len(one) for one in rows}) != 1:
                continue
            try:
                self._file.add(np.stack(rows))
            except OSError as error:
                self._stop(error)

    def close(self) -> None:
        """Hear no more."""
        for router in self._routers.values():
            router.on_choice = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _chose(self, index: int, indices: mx.array) -> None:
        if index == 0:
            self._pass = []  # one before it that did not come to its end has failed
        if index == len(self._pass):
            self._pass.append(indices)
        if len(self._pass) == len(self._routers):
            self._passes.append(self._pass)
            self._pass = []

    def _stop(self, error: OSError) -> None:
        logger.warning("experts are traced no longer: %s: %s", error.filename or self._path, error.strerror)
        self.close()
