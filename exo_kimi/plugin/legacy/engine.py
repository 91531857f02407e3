"""What legacy exo's MLX engine does for our model, as methods that stand before its own; other models go to those, unchanged.

The weights never belong to an engine object: exo replaces it on every change of the cluster.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler

from exo_kimi.errors import ExoPlacementError, UnsupportedError
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.replies import carried
from exo_kimi.plugin.legacy.stage import LegacyStage
from exo_kimi.plugin.legacy.tensors import Array, position_of
from exo_kimi.plugin.legacy.tokenizer import LegacyTokenizer

Method = Callable[..., Any]


class _Elsewhere:
    """In the place of an engine's model: its weights are in the stage."""

    model_type = "kimi_k2"

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError("legacy exo can run a Kimi, and not train, evaluate or save one", found=name)


def engine_methods(
    original: Mapping[str, Method], *, stage: LegacyStage, pinned: PinnedPlan, tokenizer: LegacyTokenizer
) -> dict[str, Method]:
    """Methods for exo's engine class.

    Args:
        original: exo's own, by name.
        stage: this node's layers.
        pinned: the plan.
        tokenizer: of the checkpoint.
    """

    async def ensure_shard(self: Any, shard: Any) -> None:
        """Exactly this node's layers, or what exo wants of another model; what was held is freed before."""
        loop = asyncio.get_running_loop()
        if shard.model_id != pinned.name:
            if stage.loaded:
                await loop.run_in_executor(stage.thread, stage.unload)
            if isinstance(getattr(self, "model", None), _Elsewhere):
                _forget(self)
            await original["ensure_shard"](self, shard)
            return
        own = pinned.range_of(pinned.own.node_id)
        if (shard.start_layer, shard.end_layer, shard.n_layers) != (*own, pinned.layers):
            raise ExoPlacementError(
                "the plan is pinned: this node takes no other layers",
                expected=f"{own[0]} to {own[1]} of {pinned.layers} ({pinned.own.node_id})",
                found=f"{shard.start_layer} to {shard.end_layer} of {shard.n_layers}",
                fix="start every node with the same plan file",
            )
        async with self._shard_lock:
            if self.shard == shard and stage.loaded:
                return
            _forget(self)
            await loop.run_in_executor(stage.thread, stage.load)
            self.model, self.tokenizer, self.shard = _Elsewhere(), tokenizer, shard

    async def infer_tensor(
        self: Any, request_id: str, shard: Any, input_data: Array, inference_state: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any] | None]:
        if shard.model_id != pinned.name:
            result: tuple[Array, dict[str, Any] | None] = await original["infer_tensor"](
                self, request_id, shard, input_data, inference_state
            )
            return result
        position = position_of(inference_state)
        await self.ensure_shard(shard)
        run = stage.thread.submit(stage.run, request_id, input_data, position)
        output, after = await asyncio.wrap_future(run)
        return output, {**after.to_state(), **carried(inference_state)}

    async def sample(self: Any, x: Array, temp: float = 0.0, top_p: float = 1.0) -> Array:
        """A token of (1, L, vocab) logits. exo's own begins the computation in one thread and ends it in another, which MLX
        0.31 and later refuse; for every model, then."""

        def choose() -> Array:
            wanted = (temp, top_p, 0.0, 1)
            if wanted != self.sampler_params:
                self.sampler_params, self.sampler = wanted, make_sampler(*wanted)
            logits = mx.array(x)[:, -1, :].astype(mx.float32)
            return np.array(self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))).astype(int)

        return await asyncio.get_running_loop().run_in_executor(self._mlx_thread, choose)

    return {"ensure_shard": ensure_shard, "infer_tensor": infer_tensor, "sample": sample}


def _forget(engine: Any) -> None:
    """Whatever model this engine object held, before another is loaded: exo itself would hold both for a while."""
    engine.shard = engine.model = None
    engine.caches, engine.session = OrderedDict(), {}
