"""Bytes of a draft head, from its headers, or of a published one by name before it is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.draft_modules import LAYER, draft_kv_bytes_per_token, draft_modules, feature_bytes_per_token
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.errors import UsageError
from exo_kimi.planner import data

WAITING_ROWS = 16
"""Positions of a sequence whose features wait at most until the head reads them together, see `runtime.stage.drafting`."""
_FOLDER = "heads"
_GROUP = 64
_BITS = (4, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftBytes:
    """A head beside a model, byte for byte.

    Args:
        name: for people.
        source: where the bytes come from: `headers`, or what is known of a published head.
        config: of the head.
        layers: of the target, whose inputs are the features.
        resident_bytes: of what the head has of its own, as MLX holds it.
        step_bytes: of it that one guess reads: its layer, norm and output head.
        enter_bytes: that true features take besides: `fc` and its norms.
        parameters: of `fc` and the layer, which every token of a prompt is multiplied with.
        borrows_embedding, borrows_head: of the target.
        tokens_per_step: what its authors measured with three guesses; None where it is not known.
    """

    name: str
    source: str
    config: DraftConfig
    layers: tuple[int, ...]
    resident_bytes: int
    step_bytes: int
    enter_bytes: int
    parameters: int
    borrows_embedding: bool
    borrows_head: bool
    tokens_per_step: float | None = None

    @property
    def kv_token_bytes(self) -> int:
        """Of one token in its cache."""
        return draft_kv_bytes_per_token(self.config)

    @property
    def feature_token_bytes(self) -> int:
        """Of one token's features, all of them."""
        return feature_bytes_per_token(self.config)

    @property
    def feature_bytes(self) -> int:
        """Of one feature of one token."""
        return 2 * self.config.target_hidden_size

    def features_before(self, layer: int) -> int:
        """How many features a stage that begins with this layer is sent beside the hidden state, which is one itself where it is
        asked for."""
        return sum(each < layer for each in self.layers)

    def weights_on(self, start_layer: int, *, embedding_bytes: int) -> int:
        """Bytes of weights on the last stage, with the target's embedding where the head needs it and the stage has none.

        Args:
            start_layer: of the stage.
            embedding_bytes: of the target's embedding.
        """
        return self.resident_bytes + (embedding_bytes if self.borrows_embedding and start_layer else 0)


def draft_bytes(draft: str | Path, target: KimiConfig) -> DraftBytes:
    """Bytes of a head.

    Args:
        draft: its directory; or a published head's name, `@4`, `@6` or `@8` behind it for that many bits.
        target: that it is for.

    Raises:
        UsageError: neither a directory nor a known name.
        CheckpointError: the directory is not a head's, or the head is not for this target.
    """
    if Path(draft).is_dir():
        manifest = resolve_draft(draft)
        manifest.config.check_target(target, where=manifest.directory)
        sizes = [(source.spec, source.resident_bytes) for source in manifest.sources]
        name = manifest.directory.resolve().name
        return _made(name, "headers", manifest.config, target, sizes, ids=manifest.parts.maps)
    name, _, bits = str(draft).partition("@")
    key = name.strip().lower()
    if key not in data.names(_FOLDER) or (bits and bits not in map(str, _BITS)):
        known = ", ".join(data.names(_FOLDER))
        raise UsageError(
            "no such draft head",
            expected=f"a directory, or one of {known}, with {', '.join(f'@{each}' for each in _BITS)} behind it or nothing",
            found=str(draft),
            where="--draft",
        )
    table = data.load(_FOLDER, key)
    config = DraftConfig.from_dict(table["config"], where=f"{key}.toml")
    config.check_target(target, where=f"{key}.toml")
    own = [
        spec
        for spec in draft_modules(config)
        if (spec.path != "embed_tokens" or table["own_embedding"]) and (spec.path != "lm_head" or table["own_head"])
    ]
    sizes = [(spec, _size(spec, int(bits) if bits else None)) for spec in own]
    title = f"{name}, {bits} bits" if bits else name
    ids = config.draft_vocab_size < config.vocab_size
    return _made(title, table["source"], config, target, sizes, ids=ids, accepted=table["tokens_per_step"])


def _size(spec: ModuleSpec, bits: int | None) -> int:
    """Resident bytes of a module in bf16, or packed in groups of 64 with a scale and a bias of 2 bytes each."""
    if bits is None or not spec.quantizable:
        return 2 * spec.parameters
    return spec.parameters * bits // 8 + spec.parameters // _GROUP * 4


def _made(
    name: str,
    source: str,
    config: DraftConfig,
    target: KimiConfig,
    sizes: Iterable[tuple[ModuleSpec, int]],
    *,
    ids: bool,
    accepted: float | None = None,
) -> DraftBytes:
    by_path = {spec.path: size for spec, size in sizes}
    fused = {path: size for path, size in by_path.items() if path.startswith("fc")}
    counted = [spec for spec in draft_modules(config) if spec.path.startswith(("fc", LAYER))]
    step_bytes = sum(by_path.values()) - sum(fused.values()) - by_path.get("embed_tokens", 0)
    return DraftBytes(
        name=name,
        source=source,
        config=config,
        layers=config.feature_layers(target.num_hidden_layers),
        resident_bytes=sum(by_path.values()) + (4 * config.draft_vocab_size if ids else 0),
        step_bytes=step_bytes,
        enter_bytes=sum(fused.values()),
        parameters=sum(spec.parameters for spec in counted),
        borrows_embedding="embed_tokens" not in by_path,
        borrows_head="lm_head" not in by_path,
        tokens_per_step=accepted,
    )
