"""The configuration of an EAGLE-3 draft head, checked key by key from its config.json.

A head is one dense decoder layer that reads the target's hidden states. Kinds differ in attention: `mha` as in Llama, `mla` as
in Kimi itself. Version 3.1 normalises the features (`fc_norm`) and hands on its normalised output (`norm_output`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.keys import check_unknown_keys
from exo_kimi.arch.llama_rope import LlamaRope, read_llama_rope
from exo_kimi.arch.numbers import is_number
from exo_kimi.arch.rope import RopeScaling, read_rope, yarn_mscale
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, UnsupportedModelError

DraftKind = Literal["mha", "mla"]

FEATURES = 3
"""Hidden states of the target that a head reads of each token, where its config does not say which."""

TARGET_KEY = "target_fingerprint"
"""Our trainer's key for what the head was trained on; published heads have none."""

_EAGLE3 = re.compile(r"eagle_?3", re.IGNORECASE)
_KINDS: dict[str, DraftKind] = {"llama": "mha", "deepseek": "mla", "kimi": "mla"}
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_ONLY_VALUE: dict[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "logit_scale": 1.0,
    "parallel_drafting": False,
    "use_sliding_window": False,
}
# Keys of published heads that bear on training or on the file, or are left from the target's config.
_HARMLESS = frozenset(
    """
    architectures attention_dropout auto_map aux_loss_alpha bos_token_id chunk_size_feed_forward dtype eagle_config ep_size
    eos_token_id first_k_dense_replace head_dim initializer_range max_position_embeddings max_window_layers
    model_type moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob
    num_experts_per_tok num_key_value_heads num_nextn_predict_layers pad_token_id pretraining_tp qk_head_dim quantization
    quantization_config routed_scaling_factor scoring_func seq_aux target_model_type topk_group topk_method torch_dtype
    transformers_version use_cache vision_config
    """.split()
)
_READ = frozenset(
    f"""
    attention_bias bias draft_vocab_size fc_norm hidden_size intermediate_size kv_lora_rank norm_before_residual norm_output
    num_attention_heads num_aux_hidden_states q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_parameters
    rope_scaling rope_theta target_hidden_size use_aux_norm v_head_dim vocab_size {_LAYER_IDS} {TARGET_KEY}
    """.split()
)
_CHANGES_MATHS = re.compile(
    r"act|attn|attention|aux|bias|cap|clip|factor|fc|freq|head|hidden|layer|lora|mlp|multiplier|norm|rope|rank|residual|rotary|"
    r"scal|sliding|theta|vocab|window|yarn"
)
_EAGLE_KEYS = frozenset((_LAYER_IDS, "use_aux_hidden_state", "use_aux_norm", "fc_norm", "norm_output"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeads:
    """Attention of the `mha` kind: q, k and v of each head, of which several queries may share a key."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: LlamaRope
    attention_bias: bool

    @property
    def kv_elements(self) -> int:
        """Cached elements of one token: keys and values."""
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLatent:
    """Attention of the `mla` kind, by the keys that Kimi's own has."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: nope and rope parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """As of `KimiConfig`."""
        scale = float(self.qk_head_dim**-0.5)
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def kv_elements(self) -> int:
        """Cached elements of one token: the latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Configuration of a head; the fields are the Hugging Face keys where there is one.

    Args:
        architecture: as config.json names it.
        hidden_size: D of the head; `target_hidden_size` is the target's, mostly the same.
        vocab_size: of the target; `draft_vocab_size` is how many of its tokens the head can draft.
        attention: of its one layer.
        layer_ids: the target's layers whose inputs are the features (0: the embedding's output; L: what leaves the last layer);
            None where the config leaves it to the default, see `feature_layers`.
        features: how many of them.
        fc_norm: whether each feature is normalised first (3.1).
        norm_output: whether the next step's hidden input is the normalised output (3.1).
        norm_before_residual: whether the residual begins with the normalised hidden input, as some trainers have it.
        bias: whether `fc` may have a bias.
        target_fingerprint: of the checkpoint that the head was trained on, where its trainer wrote it.
    """

    architecture: str
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention: DraftHeads | DraftLatent
    layer_ids: tuple[int, ...] | None
    features: int
    fc_norm: bool
    norm_output: bool
    norm_before_residual: bool
    bias: bool
    target_fingerprint: str | None
    ignored_keys: tuple[str, ...] = ()

    @property
    def kind(self) -> DraftKind:
        """`mha` or `mla`."""
        return "mha" if isinstance(self.attention, DraftHeads) else "mla"

    @property
    def version(self) -> Literal["3", "3.1"]:
        """Of EAGLE."""
        return "3.1" if self.fc_norm or self.norm_output else "3"

    @property
    def key_prefix(self) -> str:
        """What names of tensors carry in front: nothing, once they are read; see `checkpoint.draft`."""
        return ""

    def feature_layers(self, target_layers: int) -> tuple[int, ...]:
        """The layers of a target of so many whose inputs are the features; by default [2, L // 2, L - 3].

        Raises:
            ConfigError: the target has not so many layers, or they do not ascend.
        """
        layers = self.layer_ids
        if layers is None:
            layers = (2, target_layers // 2, target_layers - 3)
        if list(layers) != sorted(set(layers)):
            raise ConfigError(
                "the head's layers do not ascend"
                + ("" if self.layer_ids else f", as {target_layers} are too few for the default"),
                expected="each layer once, in ascending order",
                found=", ".join(map(str, layers)),
                where=_LAYER_IDS,
                fix="give the head that was trained for this target",
            )
        if min(layers) < 0 or max(layers) > target_layers:
            raise ConfigError(
                "the head reads layers that its target does not have",
                expected=f"layers 0 to {target_layers}, as the target has {target_layers}",
                found=", ".join(map(str, layers)),
                where=_LAYER_IDS,
                fix="give the head that was trained for this target",
            )
        return layers

    def check_target(self, target: KimiConfig, *, where: object = "config.json") -> None:
        """Refuse a target that the head cannot be for.

        Raises:
            ConfigError: another hidden size or vocabulary, or too few layers; by name.
            CheckpointProblems: several of them.
        """
        problems: list[CheckpointError] = [
            ConfigError(
                f"this head is for a target with another {key}",
                expected=f"{expected:,}, as the target has",
                found=f"{found:,}",
                where=where,
                fix="give the head that was trained for this target",
            )
            for key, expected, found in (
                ("hidden_size", target.hidden_size, self.target_hidden_size),
                ("vocab_size", target.vocab_size, self.vocab_size),
            )
            if expected != found
        ]
        try:
            self.feature_layers(target.num_hidden_layers)
        except ConfigError as error:
            problems.append(error)
        if problems:
            raise problems[0] if len(problems) == 1 else CheckpointProblems(problems, where=where)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: object = "config.json") -> DraftConfig:
        """Read a parsed config.json: check every key and keep what the maths needs.

        Raises:
            UnsupportedModelError: it is not one of an EAGLE-3 head, or of no known kind.
            ConfigError: one finding.
            CheckpointProblems: several findings at once.
        """
        name = draft_architecture(raw)
        kind = next((kind for word, kind in _KINDS.items() if name is not None and word in name.lower()), None)
        if name is None or kind is None:
            raise UnsupportedModelError(
                "this is no EAGLE-3 draft head",
                expected="architectures LlamaForCausalLMEagle3 or Eagle3DeepseekV2ForCausalLM",
                found=f"architectures {raw.get('architectures')!r}"[:120],
                where=where,
                fix="give the directory of a head that was published for this Kimi",
            )
        problems: list[CheckpointError] = []
        reader = _Reader(raw, where, problems)
        hidden = reader.count("hidden_size")
        attention = _read_heads(reader, hidden) if kind == "mha" else _read_latent(reader, hidden)
        vocab = reader.count("vocab_size")
        eagle = reader.section("eagle_config")
        layer_ids = _read_layer_ids(reader, eagle)
        values = {
            "hidden_size": hidden,
            "target_hidden_size": reader.count("target_hidden_size", hidden),
            "intermediate_size": reader.count("intermediate_size"),
            "vocab_size": vocab,
            "draft_vocab_size": reader.count("draft_vocab_size", vocab),
            "max_position_embeddings": reader.count("max_position_embeddings", 1),
            "features": reader.count("num_aux_hidden_states", len(layer_ids) if layer_ids else FEATURES),
        }
        eps = reader.positive("rms_norm_eps")
        fc_norm = reader.flag("fc_norm", eagle) or reader.flag("use_aux_norm", eagle)
        norm_output, bias = reader.flag("norm_output", eagle), reader.flag("bias")
        norm_before_residual = reader.flag("norm_before_residual")
        problems += _contradictions(values, layer_ids, eagle, where)
        ignored = _check_other_keys(raw, where, problems)
        if problems:
            raise problems[0] if len(problems) == 1 else CheckpointProblems(problems, where=where)
        fingerprint = raw.get(TARGET_KEY)
        return cls(
            architecture=name,
            attention=attention,
            layer_ids=layer_ids,
            rms_norm_eps=eps,
            fc_norm=fc_norm,
            norm_output=norm_output,
            norm_before_residual=norm_before_residual,
            bias=bias,
            target_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            ignored_keys=ignored,
            **values,
        )


def draft_architecture(raw: Mapping[str, Any]) -> str | None:
    """The architecture of a config.json that is one of an EAGLE-3 head; None of any other."""
    names = raw.get("architectures")
    found = (
        [name for name in names if isinstance(name, str) and _EAGLE3.search(name)] if isinstance(names, list) else []
    )
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Reader:
    """A config.json whose problems are collected; what has one reads as something that does no harm."""

    raw: Mapping[str, Any]
    where: object
    problems: list[CheckpointError]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.problems.append(
                ConfigError(
                    f"{key} is missing", expected="int", where=self.where, fix="copy config.json from the source"
                )
            )
        elif not is_number(value, int) or not 1 <= value <= 10**9:
            self.problems.append(
                ConfigError(
                    f"{key} has the wrong type", expected="int, at least 1", found=repr(value), where=self.where
                )
            )
        else:
            return int(value)
        return 1

    def positive(self, key: str) -> float:
        value = self.raw.get(key)
        if value is not None and is_number(value, float) and value > 0:
            return float(value)
        self.problems.append(
            ConfigError(f"{key} is missing or not positive", expected="float", found=repr(value), where=self.where)
        )
        return 1.0

    def flag(self, key: str, other: Mapping[str, Any] | None = None) -> bool:
        value = self.raw.get(key, (other or {}).get(key))
        if value is not None and not isinstance(value, bool):
            self.problems.append(
                ConfigError(f"{key} has the wrong type", expected="true or false", found=repr(value), where=self.where)
            )
        return value is True

    def section(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.problems.append(
            ConfigError(f"{key} has the wrong type", expected="an object", found=repr(value)[:80], where=self.where)
        )
        return {}


def _read_heads(reader: _Reader, hidden: int) -> DraftHeads:
    heads = reader.count("num_attention_heads")
    shared = reader.count("num_key_value_heads", heads)
    width = reader.count("head_dim", max(1, hidden // heads))
    for ok, rule, found in (
        (heads % shared == 0, f"num_key_value_heads that divides num_attention_heads {heads}", shared),
        (width % 2 == 0, "an even head_dim", width),
    ):
        if not ok:
            reader.problems.append(
                ConfigError("config.json contradicts itself", expected=rule, found=found, where=reader.where)
            )
    return DraftHeads(
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=width,
        rope=read_llama_rope(reader.raw, reader.where, reader.problems),
        attention_bias=reader.flag("attention_bias"),
    )


def _read_latent(reader: _Reader, hidden: int) -> DraftLatent:
    theta, scaling = read_rope(reader.raw, reader.where, reader.problems)
    rope = reader.count("qk_rope_head_dim")
    if rope % 2 and "qk_rope_head_dim" in reader.raw:
        reader.problems.append(
            ConfigError(
                "config.json contradicts itself", expected="an even qk_rope_head_dim", found=rope, where=reader.where
            )
        )
    return DraftLatent(
        hidden_size=hidden,
        num_attention_heads=reader.count("num_attention_heads"),
        q_lora_rank=None if reader.raw.get("q_lora_rank") is None else reader.count("q_lora_rank"),
        kv_lora_rank=reader.count("kv_lora_rank"),
        qk_nope_head_dim=reader.count("qk_nope_head_dim"),
        qk_rope_head_dim=rope,
        v_head_dim=reader.count("v_head_dim"),
        rope_theta=1.0 if theta is None else float(theta),
        rope_scaling=scaling,
        attention_bias=reader.flag("attention_bias"),
    )


def _read_layer_ids(reader: _Reader, eagle: Mapping[str, Any]) -> tuple[int, ...] | None:
    stated = [section[_LAYER_IDS] for section in (eagle, reader.raw) if section.get(_LAYER_IDS) is not None]
    if not stated:
        return None
    ids = stated[0]
    if any(other != ids for other in stated[1:]):
        reader.problems.append(
            ConfigError(
                f"{_LAYER_IDS} stands twice in config.json, and the two differ",
                expected=str(ids)[:80],
                found=str(stated[1])[:80],
                where=reader.where,
                fix="copy config.json from the source",
            )
        )
    if not isinstance(ids, list) or not ids or not all(is_number(each, int) and each >= 0 for each in ids):
        reader.problems.append(
            ConfigError(
                f"{_LAYER_IDS} cannot be read",
                expected="a list of layers, such as [2, 30, 58]",
                found=repr(ids)[:80],
                where=reader.where,
            )
        )
        return None
    return tuple(int(each) for each in ids)


def _contradictions(
    values: Mapping[str, int], layer_ids: tuple[int, ...] | None, eagle: Mapping[str, Any], where: object
) -> list[CheckpointError]:
    most, count = values["vocab_size"], values["features"]
    rules = (
        (values["draft_vocab_size"] <= most, f"draft_vocab_size at most vocab_size {most}", values["draft_vocab_size"]),
        (layer_ids is None or len(layer_ids) == count, f"{count} feature layers (num_aux_hidden_states)", layer_ids),
        (layer_ids is not None or count == FEATURES, f"{_LAYER_IDS}, as {count} features have no default", None),
        (eagle.get("use_aux_hidden_state", True) is True, "eagle_config.use_aux_hidden_state true (EAGLE-3)", False),
    )
    problems: list[CheckpointError] = [
        ConfigError("config.json contradicts itself", expected=rule, found=found, where=where)
        for ok, rule, found in rules
        if not ok
    ]
    problems += [
        ConfigError(f"unknown key eagle_config.{key} may change the maths", found=repr(value)[:80], where=where)
        for key, value in eagle.items()
        if key not in _EAGLE_KEYS and value
    ]
    return problems


def _check_other_keys(raw: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> tuple[str, ...]:
    problems += [
        ConfigError(f"{key} is not implemented", expected=repr(value), found=repr(raw[key])[:80], where=where)
        for key, value in _ONLY_VALUE.items()
        if raw.get(key) is not None and raw[key] != value
    ]
    known = _READ | _HARMLESS | _ONLY_VALUE.keys()
    return check_unknown_keys(raw, known, _CHANGES_MATHS, where, problems, what="head")
