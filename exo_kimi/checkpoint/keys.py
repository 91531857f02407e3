"""Tensor names of every published layout, parsed by one table.

    [prefix] model.layers.3.mlp.experts.17.up_proj.weight_packed
             `------------ path -- expert ---------' `- part --'

The path is that of arch.modules: `experts.17.up_proj` and `switch_mlp.up_proj` are both `switch_mlp.up_proj`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

# K2.5 and later nest the text model; transformers 5 saves the same nesting the other way round.
_PREFIXES = (("language_model.", ""), ("model.language_model.", "model."))
_NESTED = tuple(prefix for prefix, _ in _PREFIXES)
_NOT_TEXT = (
    (re.compile(r"(?:model\.)?vision_tower\..+"), "vision tower"),
    (re.compile(r"(?:model\.)?(?:mm_projector|multi_modal_projector)\..+"), "vision projector"),
    (re.compile(r".+\.rotary_emb\.inv_freq"), "rope frequencies, which follow from config.json"),
)
_PROJECTION = r"(?:gate|up|down)_proj"
_TEXT = re.compile(
    rf"""
    (?P<path>
        model\.embed_tokens | model\.norm | lm_head | model\.output_attn_res_(?:proj|norm)
      | model\.layers\.(?P<layer>\d+)\.(?:
            input_layernorm | post_attention_layernorm | (?:self_attention|mlp)_res_(?:proj|norm)
          | self_attn\.(?:[kvb]_proj | [fg]_[ab]_proj | g_proj | [qkv]_conv\.conv | o_norm)
          | self_attn(?=\.(?:A_log|dt_bias)$)
          | self_attn\.(?:q_proj | q_a_proj | q_a_layernorm | q_b_proj | kv_a_proj_with_mqa | kv_a_layernorm | kv_b_proj
                        | embed_q | unembed_out | o_proj)
          | mlp\.gate
          | mlp\.routed_expert_(?:down_proj | norm | up_proj)
          | mlp\.(?:shared_experts\.|switch_mlp\.)?{_PROJECTION}
          | mlp\.experts\.(?P<expert>\d+)\.{_PROJECTION}
        )
    )
    \.(?P<part>
        weight | bias | e_score_correction_bias | A_log | dt_bias
      | scales | biases
      | weight_packed | weight_scale | weight_shape | weight_zero_point
      | weight_scale_inv
    )
    """,
    re.VERBOSE,
)
# Published names of the same modules. Source: mlx-lm's `sanitize` of kimi_linear.
_SPELLINGS = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+\.)w1\."), r"\1gate_proj."),
    (re.compile(r"(\.experts\.\d+\.)w2\."), r"\1down_proj."),
    (re.compile(r"(\.experts\.\d+\.)w3\."), r"\1up_proj."),
    (re.compile(r"(\.self_attn\.[qkv]_conv)1d\."), r"\1.conv."),
    (re.compile(r"\b(self_attention_res|mlp_res|output_attn_res)\.(proj|norm)_weight$"), r"\1_\2.weight"),
    (re.compile(r"\.mlp\.e_score_correction_bias$"), ".mlp.gate.e_score_correction_bias"),
)
_FUSED = re.compile(
    r"""
    (?P<mlp>model\.layers\.(?P<layer>\d+)\.mlp)\.
    (?: (?:experts|switch_mlp)\.gate_up_proj(?:\.(?P<part>weight|scales|biases))? | experts\.(?P<down>down_proj) )
    """,
    re.VERBOSE,
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MTP_ONLY = re.compile(r"model\.layers\.\d+\.(?:eh_proj|enorm|hnorm|embed_tokens|shared_head)\.")


@dataclass(frozen=True, slots=True)
class TensorKey:
    """A name that a text model can consume.

    Args:
        path: the module's path, as arch.modules writes it.
        part: what follows the module, such as `weight` or `scales`.
        layer: None outside the decoder layers.
        expert: index, when experts are stored one by one.
    """

    path: str
    part: str
    layer: int | None
    expert: int | None


@dataclass(frozen=True, slots=True)
class SkippedKey:
    """A known name of a tensor that a text model does not need."""

    reason: str


def parse_key(name: str) -> TensorKey | SkippedKey | None:
    """Parse a tensor name; None for a name of no known layout."""
    before, found, after = name.partition(".experts.")
    expert, _, rest = after.partition(".")
    if not found or not expert.isdecimal():
        return _parse(name)
    # A K2 has two hundred thousand names of experts, and some hundreds when their numbers are left out.
    key = _parse_once(f"{before}.experts.0.{rest}")
    return TensorKey(key.path, key.part, key.layer, int(expert)) if isinstance(key, TensorKey) else key


def _parse(name: str) -> TensorKey | SkippedKey | None:
    name = _without_prefix(name)
    match = _TEXT.fullmatch(name) or _TEXT.fullmatch(spelled_as_mlx(name))
    if match is None:
        for pattern, reason in _NOT_TEXT:
            if pattern.fullmatch(name):
                return SkippedKey(reason)
        return None
    path, layer, expert, part = match.group("path", "layer", "expert", "part")
    if expert is not None:
        path = path.replace(f".experts.{expert}.", ".switch_mlp.")
    return TensorKey(path, part, None if layer is None else int(layer), None if expert is None else int(expert))


_parse_once = lru_cache(4096)(_parse)


def spelled_as_mlx(name: str) -> str:
    """A name without prefix, as mlx-lm's stacked layout spells its module."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


_PUBLISHED_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def as_published(path: str, *, layer_is_moe: bool) -> str:
    """The path of a Kimi Linear module, as its weights are published; the way back of `spelled_as_mlx`.

    Args:
        path: as in arch.modules, with `experts.E` in place of `switch_mlp` for one of several.
        layer_is_moe: its layer has experts.
    """
    if layer_is_moe:
        path = path.replace(".mlp.", ".block_sparse_moe.")
    head, expert, name = path.rpartition(".")
    if ".experts." in head:
        return f"{head}{expert}{_PUBLISHED_EXPERT[name]}"
    return path.replace("_conv.conv", "_conv1d")


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A name of one tensor for all experts of a layer, as transformers 5 saves them.

    Args:
        layer: of the model.
        paths: of the modules whose rows follow one another in each expert: gate and up, or down alone.
        part: `weight`, or `scales` and `biases` of a packed one.
    """

    layer: int
    paths: tuple[str, ...]
    part: str


def parse_fused(name: str) -> FusedExperts | None:
    """Parse the name of a fused `gate_up_proj` (E, 2 I, D), or of a stacked `down_proj` (E, D, I) without `.weight`; None for
    others."""
    match = _FUSED.fullmatch(_without_prefix(name))
    if match is None:
        return None
    names = ("down_proj",) if match["down"] else ("gate_proj", "up_proj")
    paths = tuple(f"{match['mlp']}.switch_mlp.{each}" for each in names)
    return FusedExperts(int(match["layer"]), paths, match["part"] or "weight")


def canonical_path(name: str) -> str:
    """A module path as a config writes it, with or without prefix and `.weight`, in the form of arch.modules."""
    spelled = spelled_as_mlx(f"{_without_prefix(name.removesuffix('.weight'))}.").removesuffix(".")
    return re.sub(r"\.experts(?:\.\d+)?\.", ".switch_mlp.", spelled)


def has_prefix(name: str) -> bool:
    """Whether a name nests the text model, as K2.5 and later do."""
    return name.startswith(_NESTED)


def _without_prefix(name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def layer_of(name: str) -> int | None:
    """The decoder layer in a name, even in one that `parse_key` cannot parse."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def is_prediction_layer(name: str) -> bool:
    """True for names that only a multi-token-prediction layer has, such as `eh_proj`."""
    return _MTP_ONLY.search(name) is not None
