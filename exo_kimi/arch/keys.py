"""The keys of a Kimi config.json: required ones, ones with a fixed value, harmless ones, and contradictions between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from exo_kimi.arch import kimi_k3
from exo_kimi.arch.numbers import is_number
from exo_kimi.errors import CheckpointError, ConfigError

_REQUIRED: dict[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "moe_intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "n_shared_experts": int,
    "n_routed_experts": int,
    "num_experts_per_tok": int,
    "routed_scaling_factor": float,
    "kv_lora_rank": int,
    "qk_nope_head_dim": int,
    "qk_rope_head_dim": int,
    "v_head_dim": int,
    "n_group": int,
    "topk_group": int,
    "norm_topk_prob": bool,
    "first_k_dense_replace": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFamily:
    """How the config.json of one family spells what a `KimiConfig` holds.

    Args:
        name: of the family.
        model_types: its text models.
        only_value: keys with one value that this project implements: what the modelling code assumes where Hugging Face's class
            has no such key (transformers 5 drops these on saving).
        optional: further keys that bear on the maths.
        harmless: keys that have no meaning in this family.
        spelled: field -> its published key, where the two differ; either is read.
        rotates: whether attention has rotary positions.
        linear: whether some layers have Kimi Delta Attention.
        residuals: whether layers have what `arch.kimi_k3` says.
    """

    name: str
    model_types: tuple[str, ...]
    only_value: Mapping[str, object]
    optional: tuple[str, ...]
    harmless: frozenset[str] = frozenset()
    spelled: Mapping[str, str] = field(default_factory=dict)
    rotates: bool = True
    linear: bool = False
    residuals: bool = False

    def key(self, name: str) -> str:
        """The published key of a field."""
        return self.spelled.get(name, name)

    def fields(self, text: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> dict[str, Any]:
        """The keys under the names of fields; a field in two spellings that differ is a problem."""
        published = {key: name for name, keys in self._spellings().items() for key in keys}
        renamed: dict[str, Any] = {}
        for key, value in text.items():
            name = published.get(key, key)
            if name in renamed and renamed[name] != value:
                problems.append(
                    ConfigError(
                        f"{key} contradicts another spelling of it",
                        expected=repr(renamed[name])[:80],
                        found=repr(value)[:80],
                        where=where,
                        fix="copy config.json from the source",
                    )
                )
            renamed[name] = value
        return renamed

    def _spellings(self) -> dict[str, tuple[str, ...]]:
        # transformers 5 saves a number of experts under a name of its own.
        again = {"n_routed_experts": ("num_local_experts",)}
        return {name: (key, *again.get(name, ())) for name, key in self.spelled.items()}


EXPERTS_PER_LAYER = "n_routed_experts_per_layer"
"""Key of a checkpoint whose layers have different numbers of experts: one number a decoder layer, 0 where it is dense. No
published model has it; vLLM's forks for pruned models read it by this name."""
_OPTIONAL = ("model_type", "mlp_layer_types", "layer_types", "q_lora_rank", "moe_layer_freq", "attention_bias")
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_LINEAR = ("linear_attn_config", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
_ALWAYS: dict[str, object] = {"hidden_act": "silu", "scoring_func": "sigmoid", "tie_word_embeddings": False}
K2 = KeyFamily(
    name="Kimi K2",
    model_types=("kimi_k2", "deepseek_v3"),
    only_value={**_ALWAYS, "topk_method": "noaux_tc", "rope_interleave": True},
    optional=(*_OPTIONAL, *_ROPE, EXPERTS_PER_LAYER),
)
KIMI_LINEAR = KeyFamily(
    name="Kimi Linear",
    model_types=("kimi_linear",),
    only_value={**_ALWAYS, "mla_use_nope": True},
    optional=(*_OPTIONAL, *_LINEAR),
    # Rotary positions are written and, with mla_use_nope, not used; its class has grouped choice always.
    harmless=frozenset((*_ROPE, "use_grouped_topk")),
    spelled={
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "max_position_embeddings": "model_max_length",
        "scoring_func": "moe_router_activation_func",
    },
    rotates=False,
    linear=True,
)
KIMI_K3 = KeyFamily(
    name="Kimi K3",
    model_types=("kimi_linear",),
    only_value={**KIMI_LINEAR.only_value, "hidden_act": "situ"},
    optional=(*KIMI_LINEAR.optional, *kimi_k3.KEYS),
    harmless=KIMI_LINEAR.harmless,
    spelled=KIMI_LINEAR.spelled,
    rotates=False,
    linear=True,
    residuals=True,
)
FAMILIES = (K2, KIMI_LINEAR)
NESTED = {"kimi_k25": K2, "kimi_k3": KIMI_K3}
"""Families whose text model is nested under `text_config`, by the outer model_type."""
# Hugging Face's classes take null for "no groups".
_NULL_IS_ONE = ("n_group", "topk_group")
# What transformers 5 calls the layers of a model that attends everywhere.
_FULL_ATTENTION = ("full_attention", "attention")
# Keys of real Kimi configs that bear on training, on generation or on the file itself, never on the forward pass.
_HARMLESS = frozenset(
    """
    architectures attention_dropout attn_implementation auto_map aux_loss_alpha bos_token_id chunk_size_feed_forward
    diversity_penalty dtype early_stopping eos_token_id ep_size head_dim id2label ignore_index initializer_range
    label2id length_penalty max_length media_placeholder_token_id min_length no_repeat_ngram_size num_beam_groups
    num_beams num_key_value_heads num_nextn_predict_layers num_return_sequences output_attentions output_hidden_states
    output_router_logits pad_token_id pretraining_tp qk_head_dim quantization quantization_config repetition_penalty
    return_dict seq_aux temperature top_k top_p torch_dtype transformers_version typical_p unsloth_fixed use_bfloat16
    use_cache use_unified_vision_chunk video_placeholder vision_config
    """.split()
)
_MOST = 10_000  # layers, and experts of a layer
_CHANGES_MATHS = re.compile(
    r"act|attn|attention|bias|cap|clip|expert|factor|freq|gate|group|head|hidden|layer|lora|mlp|moe|multiplier|mup|norm|rope|"
    r"rank|residual|rotary|router|routed|scal|sliding|theta|top_?k|window|yarn"
)


def read_required(
    text: Mapping[str, Any], family: KeyFamily, where: object, problems: list[CheckpointError]
) -> dict[str, Any]:
    """The required fields that can be read, of keys under the names of fields."""
    values: dict[str, Any] = {}
    for key, kind in _REQUIRED.items():
        found = text.get(key)
        if key in _NULL_IS_ONE and key in text and found is None:
            found = 1
        if key == "first_k_dense_replace" and found is None:
            found = _dense_layers(text.get("mlp_layer_types"))
        if found is None:
            problems.append(
                ConfigError(
                    f"{family.key(key)} is missing",
                    expected=kind.__name__,
                    where=where,
                    fix="copy config.json from the source",
                )
            )
        elif not is_number(found, kind):
            problems.append(
                ConfigError(
                    f"{family.key(key)} has the wrong type", expected=kind.__name__, found=repr(found), where=where
                )
            )
        else:
            values[key] = kind(found)
    return values


def _dense_layers(kinds: object) -> int | None:
    """How many layers are dense before the first sparse one, as transformers 5 spells `first_k_dense_replace`."""
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"dense", "sparse"}:
        return None
    return kinds.index("sparse") if "sparse" in kinds else len(kinds)


def check_layer_kinds(
    text: Mapping[str, Any], values: Mapping[str, Any], family: KeyFamily, where: object
) -> list[CheckpointError]:
    """Errors where lists of a kind for each layer say another model than the other keys."""
    layers, dense, every = (values[key] for key in ("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq"))
    sparse = ["sparse" if layer >= dense and layer % every == 0 else "dense" for layer in range(layers)]
    problems: list[CheckpointError] = []
    kinds = text.get("mlp_layer_types")
    if kinds is not None and kinds != sparse:
        problems.append(
            ConfigError(
                "mlp_layer_types is another model than first_k_dense_replace and moe_layer_freq",
                expected=f"{sparse.count('dense')} times dense and {sparse.count('sparse')} times sparse, in their order",
                found=_in_words(kinds),
                where=where,
                fix="copy config.json from the source",
            )
        )
    kinds = text.get("layer_types")
    if (
        kinds is not None
        and not family.linear
        and not (isinstance(kinds, list) and len(kinds) == layers and all(kind in _FULL_ATTENTION for kind in kinds))
    ):
        problems.append(
            ConfigError(
                "layer_types has layers that do not attend to the whole context",
                expected=f"{layers} times full_attention, as in every Kimi K2",
                found=_in_words(kinds),
                where=where,
                fix="this checkpoint needs a newer exo-kimi",
            )
        )
    return problems


def read_experts_per_layer(
    text: Mapping[str, Any], values: Mapping[str, Any], where: object, problems: list[CheckpointError]
) -> tuple[int, ...] | None:
    """The experts of each layer where they differ; None where all layers with experts have as many."""
    counts = text.get(EXPERTS_PER_LAYER)
    if counts is None:
        return None
    most, chosen, groups = (values[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_group"))
    least = max(chosen, -(-chosen * groups // values["topk_group"]))
    layers, dense, every = (values[key] for key in ("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq"))
    sparse = [layer >= dense and layer % every == 0 for layer in range(layers)]
    ints = isinstance(counts, list) and all(is_number(count, int) for count in counts)
    if not ints or len(counts) != layers or max(counts, default=0) != most:
        expected = f"{layers} whole numbers, one for each layer, the largest n_routed_experts {most}"
        found = f"{len(counts)} of at most {max(counts, default=0)}" if ints else repr(counts)[:80]
    elif wrong := [
        f"{count} in layer {layer}"
        for layer, (count, moe) in enumerate(zip(counts, sparse, strict=True))
        if not ((moe and least <= count <= most and count % groups == 0) or (not moe and count == 0))
    ]:
        expected = f"0 in dense layers, else {least} to {most}" + (f", multiples of n_group {groups}" * (groups > 1))
        found = ", ".join(wrong[:4])
    else:
        return None if len({count for count in counts if count}) <= 1 else tuple(counts)
    problems.append(
        ConfigError(
            f"{EXPERTS_PER_LAYER} is no count of experts for each layer",
            expected=expected,
            found=found,
            where=where,
            fix="copy config.json from the source, or prune it again",
        )
    )
    return None


def _in_words(kinds: object) -> str:
    if not isinstance(kinds, list):
        return repr(kinds)[:80]
    counts = Counter(map(str, kinds))
    return (", ".join(f"{count} times {kind}" for kind, count in counts.most_common(4)) or "an empty list")[:200]


def read_q_lora_rank(text: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> int | None:
    if "q_lora_rank" not in text:
        problems.append(ConfigError("q_lora_rank is missing", expected="int, or null for a plain q_proj", where=where))
        return None
    rank = text["q_lora_rank"]
    if rank is not None and not is_number(rank, int):
        problems.append(
            ConfigError("q_lora_rank has the wrong type", expected="int or null", found=repr(rank), where=where)
        )
        return None
    return None if rank is None else int(rank)


def check_other_keys(
    text: Mapping[str, Any], family: KeyFamily, where: object, problems: list[CheckpointError]
) -> tuple[str, ...]:
    """Refuse values that this project does not implement; return the unknown keys that cannot matter."""
    for key, value in family.only_value.items():
        if key in text and text[key] != value:
            problems.append(
                ConfigError(
                    f"{family.key(key)} is not implemented", expected=repr(value), found=repr(text[key]), where=where
                )
            )
    known = {*_REQUIRED, *family.only_value, *family.optional, *family.harmless, *_HARMLESS}
    return check_unknown_keys(text, known, _CHANGES_MATHS, where, problems)


def check_unknown_keys(
    text: Mapping[str, Any],
    known: Container[str],
    changes_maths: re.Pattern[str],
    where: object,
    problems: list[CheckpointError],
    *,
    what: str = "checkpoint",
) -> tuple[str, ...]:
    """Refuse keys that are not known and may change the maths; return those that cannot.

    Args:
        text: of a config.json.
        known: its keys that are read, fixed or harmless.
        changes_maths: found in the names of keys that may matter.
        where: for the errors.
        problems: that the errors are added to.
        what: the config is of, for people.
    """
    unknown = [key for key, value in text.items() if key not in known and not key.startswith("_") and value]
    problems += [
        ConfigError(
            f"unknown key {key} may change the maths",
            found=repr(text[key])[:80],
            where=where,
            fix=f"this {what} needs a newer exo-kimi; if the key is harmless, set it to null",
        )
        for key in unknown
        if changes_maths.search(key)
    ]
    return tuple(key for key in unknown if not changes_maths.search(key))


def contradictions(values: Mapping[str, Any], where: object) -> list[CheckpointError]:
    """Errors for numbers that cannot be true together."""
    experts, groups = values["n_routed_experts"], values["n_group"]
    positive = [
        key
        for key, kind in _REQUIRED.items()
        if kind is int and key not in ("first_k_dense_replace", "n_shared_experts")
    ]
    rules: list[tuple[bool, str, object]] = [(values[key] >= 1, f"{key} at least 1", values[key]) for key in positive]
    # Larger numbers are damage, and walking over them would take forever.
    rules += [
        (values[key] <= _MOST, f"{key} at most {_MOST:,}", values[key])
        for key in ("num_hidden_layers", "n_routed_experts")
    ]
    rules += [
        (
            0 <= values["first_k_dense_replace"] <= values["num_hidden_layers"],
            "first_k_dense_replace within the layers",
            values["first_k_dense_replace"],
        ),
        (values["n_shared_experts"] >= 0, "n_shared_experts at least 0", values["n_shared_experts"]),
        (
            values["q_lora_rank"] is None or values["q_lora_rank"] >= 1,
            "q_lora_rank at least 1 or null",
            values["q_lora_rank"],
        ),
        (
            is_number(values["moe_layer_freq"], int) and values["moe_layer_freq"] >= 1,
            "moe_layer_freq at least 1",
            values["moe_layer_freq"],
        ),
        (
            values["num_experts_per_tok"] <= experts,
            f"num_experts_per_tok at most n_routed_experts {experts}",
            values["num_experts_per_tok"],
        ),
        (groups >= 1 and experts % groups == 0, f"n_group that divides n_routed_experts {experts}", groups),
        (values["topk_group"] <= groups, f"topk_group at most n_group {groups}", values["topk_group"]),
        (values["qk_rope_head_dim"] % 2 == 0, "an even qk_rope_head_dim", values["qk_rope_head_dim"]),
        (values["rms_norm_eps"] > 0, "a positive rms_norm_eps", values["rms_norm_eps"]),
        (values["routed_scaling_factor"] > 0, "a positive routed_scaling_factor", values["routed_scaling_factor"]),
    ]
    return [
        ConfigError("config.json contradicts itself", expected=rule, found=found, where=where)
        for ok, rule, found in rules
        if not ok
    ]
