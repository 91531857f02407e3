"""The vision tower of Kimi K2.5 and later (MoonViT) and its projector: configuration, tensors, bytes, and tokens of a picture.

    pixels (H, W, 3) -> patches of patch_size -> tower -> 2 x 2 patches side by side -> projector -> one vector a media token

Source: config.json (`vision_config`) and preprocessor_config.json (`media_proc_cfg`) of moonshotai/Kimi-K2.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError

NORM_EPS = 1e-5
"""Of the tower's norms; MoonViT's code states it, no config does."""
ROPE_THETA = 10_000.0
CHANNELS = 3
KEPT_VECTORS = 8_192
"""Vectors of pictures that a stage keeps: three screens of 1920 x 1080, for a conversation that goes on about them."""
_SIZES = (
    "patch_size",
    "vt_hidden_size",
    "vt_intermediate_size",
    "vt_num_attention_heads",
    "vt_num_hidden_layers",
    "init_pos_emb_height",
    "init_pos_emb_width",
    "init_pos_emb_time",
)
_ONLY_VALUE: dict[str, object] = {
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "video_attn_type": "spatial_temporal",
}
_MOST = 100_000  # of any size: a larger one is damage


@dataclass(frozen=True, slots=True)
class Grid:
    """How many patches a picture has: `frames` of `rows` by `columns`. A still picture has one frame."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Patches of all frames."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Configuration of the tower and its projector; the fields are the keys of `vision_config`.

    Args:
        hidden_size: of the text model, which the projector ends in.
        media_placeholder_token_id: what stands in a prompt for each vector.
    """

    patch_size: int
    vt_hidden_size: int
    vt_intermediate_size: int
    vt_num_attention_heads: int
    vt_num_hidden_layers: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    init_pos_emb_time: int
    merge_kernel_size: tuple[int, int]
    projector_ln_eps: float
    hidden_size: int
    media_placeholder_token_id: int

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.vt_hidden_size // self.vt_num_attention_heads

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.vt_hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]

    def tokens(self, grid: Grid) -> int:
        """Vectors, and media tokens, of a picture; the frames of a film are averaged."""
        height, width = self.merge_kernel_size
        return (grid.rows // height) * (grid.columns // width)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its published name, with its shape."""
        hidden, inner, patch = self.vt_hidden_size, self.vt_intermediate_size, self.patch_size
        positions = (self.init_pos_emb_height, self.init_pos_emb_width, hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "vision_tower.patch_embed.proj.weight": (hidden, CHANNELS, patch, patch),
            "vision_tower.patch_embed.proj.bias": (hidden,),
            "vision_tower.patch_embed.pos_emb.weight": positions,
        }
        modules = {"norm0": (hidden,), "norm1": (hidden,), "wqkv": (3 * hidden, hidden), "wo": (hidden, hidden)}
        modules |= {"mlp.fc0": (inner, hidden), "mlp.fc1": (hidden, inner)}
        for block in range(self.vt_num_hidden_layers):
            for name, shape in modules.items():
                shapes |= _with_bias(f"vision_tower.encoder.blocks.{block}.{name}", shape)
        shapes |= _with_bias("vision_tower.encoder.final_layernorm", (hidden,))
        shapes |= _with_bias("mm_projector.pre_norm", (hidden,))
        shapes |= _with_bias("mm_projector.proj.0", (self.merged_size, self.merged_size))
        return shapes | _with_bias("mm_projector.proj.2", (self.hidden_size, self.merged_size))

    @property
    def parameters(self) -> int:
        """Number of weights of tower and projector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def published_bytes(self) -> int:
        """Bytes that the first stage holds for pictures of a model in bf16, as published: weights, and the vectors it keeps."""
        return 2 * (self.parameters + KEPT_VECTORS * self.hidden_size)

    def fixed_bytes(self, patches: int, *, element_bytes: int = 2) -> int:
        """Bytes that a pass over a picture takes apart from the blocks of attention and MLP: the residual, its norm, the
        attention's output, and what is being added, each (patches, vt_hidden_size); or the projector's rows."""
        merged = patches * self.vt_hidden_size * 3 + patches * self.hidden_size // math.prod(self.merge_kernel_size)
        return max(4 * patches * self.vt_hidden_size, merged) * element_bytes

    def heads_bytes(self, heads: int, patches: int, *, element_bytes: int = 2) -> int:
        """Bytes of the queries, keys and values of some heads: as projected, turned in float32, and laid out by head."""
        return heads * patches * self.head_dim * (3 * element_bytes + 2 * 3 * 4 + 3 * element_bytes)

    def row_bytes(self, heads: int, patches: int, *, element_bytes: int = 2) -> int:
        """Bytes of one query's scores in some heads: as computed, as a softmax, and MLX's third (see `arch.scratch`)."""
        return 3 * heads * patches * element_bytes

    def scratch_bytes(self, patches: int, *, element_bytes: int = 2) -> int:
        """The least bytes in which a picture can be computed: one head and one row at a time."""
        block = self.heads_bytes(1, patches, element_bytes=element_bytes) + self.row_bytes(
            1, patches, element_bytes=element_bytes
        )
        return self.fixed_bytes(patches, element_bytes=element_bytes) + block

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, hidden_size: int, where: object = "config.json"
    ) -> VisionConfig | None:
        """Read a parsed config.json, the outer one; None where it describes no vision.

        Args:
            raw: config.json.
            hidden_size: of the text model.
            where: named in errors.

        Raises:
            ConfigError: one finding.
            CheckpointProblems: several at once.
        """
        stated = raw.get("vision_config")
        if stated is None:
            return None
        if not isinstance(stated, Mapping):
            raise ConfigError("vision_config is no object", found=type(stated).__name__, where=where)
        problems: list[CheckpointError] = []
        values: dict[str, Any] = {key: _size(stated, key, f"vision_config.{key}", where, problems) for key in _SIZES}
        values["merge_kernel_size"] = _merge(stated.get("merge_kernel_size"), where, problems)
        values["projector_ln_eps"] = _eps(stated.get("projector_ln_eps"), where, problems)
        name = "media_placeholder_token_id"
        values[name] = _size(raw, name, name, where, problems)
        for key, value in _ONLY_VALUE.items():
            if stated.get(key, value) != value:
                problems.append(_not_implemented(key, value, stated[key], where))
        for key, value in (("mm_hidden_size", "vt_hidden_size"), ("text_hidden_size", None)):
            wanted = hidden_size if value is None else values[value]
            if stated.get(key, wanted) != wanted:
                problems.append(_not_implemented(key, wanted, stated[key], where))
        if not problems:
            problems += _contradictions(values, where)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise CheckpointProblems(problems, where=where)
        return cls(hidden_size=hidden_size, **values)


def _with_bias(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{path}.weight": shape, f"{path}.bias": shape[:1]}


def _size(stated: Mapping[str, Any], key: str, name: str, where: object, problems: list[CheckpointError]) -> int | None:
    found = stated.get(key)
    if (
        isinstance(found, int | float)
        and is_number(found, int)
        and 0 < found <= _MOST * (10 if key.endswith("_id") else 1)
    ):
        return int(found)
    what = f"{name} is missing" if found is None else f"{name} has no possible value"
    problems.append(
        ConfigError(
            what,
            expected="a positive int",
            found=None if found is None else repr(found),
            where=where,
            fix="copy config.json from the source, or serve text alone with --no-vision",
        )
    )
    return None


def _merge(found: object, where: object, problems: list[CheckpointError]) -> tuple[int, int] | None:
    if isinstance(found, list | tuple) and len(found) == 2 and all(is_number(n, int) and 1 <= n <= 16 for n in found):
        return (int(found[0]), int(found[1]))
    problems.append(
        ConfigError(
            "vision_config.merge_kernel_size has no possible value",
            expected="two ints from 1 to 16",
            found=repr(found),
            where=where,
        )
    )
    return None


def _eps(found: object, where: object, problems: list[CheckpointError]) -> float | None:
    if is_number(found, float) and isinstance(found, int | float) and found > 0:
        return float(found)
    problems.append(
        ConfigError(
            "vision_config.projector_ln_eps has no possible value",
            expected="a positive number",
            found=repr(found),
            where=where,
        )
    )
    return None


def _not_implemented(key: str, expected: object, found: object, where: object) -> ConfigError:
    return ConfigError(
        f"vision_config.{key} is not implemented",
        expected=repr(expected),
        found=repr(found)[:80],
        where=where,
        fix="this checkpoint needs a newer exo-kimi; its text can be served with --no-vision",
    )


def _contradictions(values: Mapping[str, Any], where: object) -> list[CheckpointError]:
    hidden, heads = values["vt_hidden_size"], values["vt_num_attention_heads"]
    rules = (
        (hidden % heads == 0, f"vt_num_attention_heads that divides vt_hidden_size {hidden}", heads),
        # A turn by the column and one by the row take two numbers each.
        (hidden // heads % 4 == 0, "a head width that is a multiple of 4", hidden / heads),
    )
    return [
        ConfigError("vision_config contradicts itself", expected=rule, found=found, where=where)
        for ok, rule, found in rules
        if not ok
    ]
