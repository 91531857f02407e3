"""Bytes of a model, layer by layer: from headers, or from architecture and recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import kv_bytes_per_token, served_state_bytes, state_bytes_per_sequence
from exo_kimi.arch.modules import stage_modules
from exo_kimi.checkpoint.adapters.manifest import AdapterManifest
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.vision import NoVision, VisionManifest
from exo_kimi.errors import UsageError
from exo_kimi.planner import data
from exo_kimi.planner.weights.recipes import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """Resident bytes of a model.

    Args:
        name: for people.
        config: its architecture.
        source: where the bytes come from: `headers`, or the recipe's title.
        hash: the checkpoint's fingerprint, or the hash of architecture and recipe.
        from_headers: whether there are weights.
        layer_bytes: one per decoder layer, everything in it.
        expert_bytes: one per decoder layer, its routed experts only (0 where dense).
        expert_disk_bytes: the same as they lie on disk: official INT4 has no biases there, which are made from the scales.
        embedding_bytes: held by the stage of layer 0.
        head_bytes: final norm and lm_head, held by the stage of the last layer.
        kv_bits: of its cache; None for bf16.
        vision_bytes: of the vision tower and the vectors that it keeps, held by the stage of layer 0.
        widened_bytes: one per decoder layer, what serving holds on top: routers become float32, and adapters.
    """

    name: str
    config: KimiConfig
    source: str
    hash: str
    from_headers: bool
    layer_bytes: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    expert_disk_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    widened_bytes: tuple[int, ...]
    kv_bits: int | None = None
    vision_bytes: int = 0

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_bytes)

    @property
    def total_bytes(self) -> int:
        """All of it, every module once."""
        return sum(self.layer_bytes) + self.embedding_bytes + self.head_bytes + self.vision_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Cache bytes of one token in all layers."""
        return kv_bytes_per_token(self.config, 0, self.layers, kv_bits=self.kv_bits)

    def kv_layer_bytes(self, layer: int) -> int:
        """Cache bytes of one token in one layer: the latent and the shared rope key (1,152 for K2, 612 in 8 bits); 0 where the
        layer has a state."""
        return kv_bytes_per_token(self.config, layer, layer + 1, kv_bits=self.kv_bits)

    def state_layer_bytes(self, layer: int) -> int:
        """Bytes of the state of a sequence in one layer; 0 where it caches every token."""
        return state_bytes_per_sequence(self.config, layer, layer + 1)

    def served_state_bytes(self, layer: int) -> int:
        """The same with the state before the newest pass, which is kept to take guesses back."""
        return served_state_bytes(self.config, layer, layer + 1)

    def cache_bytes(self, start_layer: int, end_layer: int, *, tokens: int, sequences: int) -> int:
        """Bytes that a stage keeps of its sequences: what it caches of `tokens` tokens of them all, and the states of each."""
        layers = range(start_layer, end_layer)
        return sum(tokens * self.kv_layer_bytes(layer) + sequences * self.served_state_bytes(layer) for layer in layers)

    def weight_bytes(self, start_layer: int, end_layer: int, *, ends_everywhere: bool = False) -> int:
        """Weights of a stage as it holds them to serve: its layers, embeddings and head only where owned.

        Args:
            start_layer: first layer.
            end_layer: one past the last.
            ends_everywhere: every stage holds embedding, norm and head, as in mlx-lm's and exo's own pipeline.
        """
        total = sum(self.layer_bytes[start_layer:end_layer])
        if not ends_everywhere:  # exo's own engine holds routers as they are stored
            total += sum(self.widened_bytes[start_layer:end_layer])
        if start_layer == 0 or ends_everywhere:
            total += self.embedding_bytes
        if end_layer == self.layers or ends_everywhere:
            total += self.head_bytes
        if start_layer == 0:
            total += self.vision_bytes
        return total

    def slot_bytes(self, start_layer: int, end_layer: int) -> int:
        """One slot in each layer of a range: an expert of each."""
        return sum(self.expert_slot_bytes[start_layer:end_layer])

    @property
    def expert_slot_bytes(self) -> tuple[int, ...]:
        """One per decoder layer, an expert of it; 0 where it is dense."""
        return tuple(-(-size // self.experts(layer)) for layer, size in enumerate(self.expert_bytes))

    def experts(self, layer: int) -> int:
        """Routed experts of a layer, to divide by: where it is dense, and has no bytes to divide, as many as elsewhere."""
        return self.config.routed_experts(layer) or self.config.n_routed_experts

    def touched_share(self, layer: int, tokens: float) -> float:
        """Share of a layer's experts that so many tokens choose, when each chooses for itself: 1 - (1 - K/E)^tokens."""
        unused = max(0.0, 1.0 - self.config.num_experts_per_tok / self.experts(layer))
        return float(1.0 - unused**tokens)

    def with_tower(self, tower: VisionManifest | NoVision | None) -> ModelBytes:
        """The same model with a vision tower, if there is one."""
        if not isinstance(tower, VisionManifest):
            return self
        return replace(self, vision_bytes=tower.resident_bytes + tower.kept_bytes)

    def with_adapters(self, adapters: Iterable[AdapterManifest]) -> ModelBytes:
        """The same model with adapters beside it, each layer's part on the stage of the layer."""
        counts = list(self.widened_bytes)
        for adapter in adapters:
            for layer in range(self.layers):
                counts[layer] += adapter.bytes_within(layer, layer + 1)
        return replace(self, widened_bytes=tuple(counts))

    def with_weights(self, weights: ModelBytes) -> ModelBytes:
        """Other weights of the same model, with this one's cache and vision tower."""
        return replace(weights, kv_bits=self.kv_bits, vision_bytes=self.vision_bytes)

    def active_bytes(self, batch: int = 1) -> int:
        """Bytes read for one decode step of `batch` tokens, KV apart: everything but the embedding's rows."""
        return sum(self.active_layer_bytes(layer, batch) for layer in range(self.layers)) + self.head_bytes

    def active_layer_bytes(self, layer: int, batch: int = 1) -> int:
        """Bytes of one layer that a step of `batch` tokens reads: each expert that any of them picks, once.

        K of E experts a token, E (1 - (1 - K/E)^batch) distinct ones expected when tokens choose independently.
        """
        experts = self.expert_bytes[layer]
        return self.layer_bytes[layer] - experts + round(experts * self.touched_share(layer, batch))


def bytes_of_manifest(manifest: StageManifest, *, name: str | None = None) -> ModelBytes:
    """Bytes of a checkpoint from its headers, as MLX will hold it.

    Raises:
        UsageError: the manifest is of a part of the model.
    """
    layers = manifest.config.num_hidden_layers
    if (manifest.start_layer, manifest.end_layer) != (0, layers):
        raise UsageError(
            "a plan needs the headers of the whole model",
            expected=f"layers 0:{layers}",
            found=f"{manifest.start_layer}:{manifest.end_layer}",
            where=manifest.directory,
        )
    sizes = [
        (source.spec.layer, source.spec.kind, source.resident_bytes, source.widened_bytes, source.disk_bytes)
        for source in manifest.sources
    ]
    return _collect(
        sizes,
        manifest.config,
        name=name or manifest.directory.name,
        source="headers",
        hash=manifest.fingerprint,
        from_headers=True,
    )


def bytes_of_recipe(config: KimiConfig, recipe: Recipe, *, name: str) -> ModelBytes:
    """Bytes of a model that nobody has downloaded yet.

    Raises:
        UsageError: the recipe's groups do not divide the model's rows.
    """
    layers = config.num_hidden_layers
    sizes = [
        (spec.layer, spec.kind, recipe.weight_bytes(spec), recipe.widened_bytes(spec), recipe.disk_bytes(spec))
        for spec in recipe.modules(config, 0, layers)
    ]
    shapes = [[spec.path, list(spec.shape)] for spec in stage_modules(config, 0, layers)]
    return _collect(
        sizes,
        config,
        name=name,
        source=recipe.title,
        hash=data.digest([shapes, recipe.hash]),
        from_headers=False,
    )


def _collect(
    sizes: Sequence[tuple[int | None, str, int, int, int]],
    config: KimiConfig,
    *,
    name: str,
    source: str,
    hash: str,
    from_headers: bool,
) -> ModelBytes:
    layer_bytes = [0] * config.num_hidden_layers
    expert_bytes = [0] * config.num_hidden_layers
    expert_disk_bytes = [0] * config.num_hidden_layers
    widened_bytes = [0] * config.num_hidden_layers
    embedding_bytes = head_bytes = 0
    for layer, kind, size, widened, on_disk in sizes:
        if layer is None and kind == "embedding":
            embedding_bytes += size
        elif layer is None:
            head_bytes += size
        else:
            layer_bytes[layer] += size
            expert_bytes[layer] += size if kind == "experts" else 0
            expert_disk_bytes[layer] += on_disk if kind == "experts" else 0
            widened_bytes[layer] += widened
    return ModelBytes(
        name=name,
        config=config,
        source=source,
        hash=hash,
        from_headers=from_headers,
        layer_bytes=tuple(layer_bytes),
        expert_bytes=tuple(expert_bytes),
        expert_disk_bytes=tuple(expert_disk_bytes),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        widened_bytes=tuple(widened_bytes),
    )
