"""Tiny draft heads in the published layouts, random but seeded: they stand in for published ones in tests."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig, DraftKind
from exo_kimi.arch.draft_modules import LAYER, draft_modules
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint import packing
from exo_kimi.checkpoint.packing import Floats
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.errors import UsageError

Spelling = Literal["midlayer", "model.midlayer", "layers.0", "model.layers.0"]
SPELLINGS: tuple[Spelling, ...] = ("midlayer", "model.midlayer", "layers.0", "model.layers.0")
_ARCHITECTURES: dict[DraftKind, str] = {"mha": "LlamaForCausalLMEagle3", "mla": "Eagle3DeepseekV2ForCausalLM"}
_ABOVE = ("lm_head", "d2t", "t2d")  # what stands beside the model in a file that has `model.`


def draft_raw_config(
    target: KimiConfig, *, kind: DraftKind, version: Literal["3", "3.1"] = "3", draft_vocab_size: int | None = None
) -> dict[str, Any]:
    """The config.json of a head as published ones are written, with the target's widths.

    Args:
        target: that it drafts for.
        kind: of attention.
        version: of EAGLE.
        draft_vocab_size: None for the target's whole vocabulary.
    """
    layers = target.num_hidden_layers
    ids = [1, layers // 2, layers - 1] if layers >= 4 else list(range(3))
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": "llama" if kind == "mha" else "kimi_k2",
        "attention_bias": False,
        "bias": False,
        "draft_vocab_size": draft_vocab_size or target.vocab_size,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        "hidden_act": "silu",
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "max_position_embeddings": target.max_position_embeddings,
        "num_attention_heads": target.num_attention_heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": target.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": target.vocab_size,
    }
    if kind == "mha":
        raw |= {"num_key_value_heads": max(1, target.num_attention_heads // 2)}
        raw |= {"head_dim": target.hidden_size // target.num_attention_heads}
    else:
        keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        raw |= {key: getattr(target, key) for key in keys}
    if version == "3.1":
        raw |= {"fc_norm": True, "norm_output": True}
    return raw


class TinyDraftWeights:
    """Seeded weights of a head; a module's depend on the seed and its path only.

    Args:
        config: of the head.
        seed: another seed is another head.
    """

    def __init__(self, config: DraftConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def weight(self, spec: ModuleSpec) -> Floats:
        """The float32 weight of a module: norms near 1, else a product keeps the size of what it is given."""
        noise = self._normal(spec.path, spec.shape)
        if spec.kind == "norm":
            return 1 + np.float32(0.1) * noise
        return noise if spec.kind == "embedding" else noise * np.float32(spec.shape[-1] ** -0.5)

    def bias(self, spec: ModuleSpec) -> Floats:
        """The bias of a linear that has one."""
        return np.float32(0.1) * self._normal(f"{spec.path}.bias", spec.shape[:1])

    def target_ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which tokens of the target it drafts, ascending."""
        generator = np.random.default_rng([self.seed, 3])
        chosen = generator.choice(self.config.vocab_size, self.config.draft_vocab_size, replace=False)
        return np.sort(chosen).astype(np.int64)

    def _normal(self, name: str, shape: tuple[int, ...]) -> Floats:
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), 2])
        return generator.standard_normal(shape, dtype=np.float32)


def make_tiny_draft(
    directory: str | Path,
    target: KimiConfig,
    *,
    kind: DraftKind = "mla",
    version: Literal["3", "3.1"] = "3",
    draft_vocab_size: int | None = None,
    spelling: Spelling = "midlayer",
    seed: int = 0,
    own_embedding: bool = True,
    own_head: bool = True,
    bits: int | None = None,
    dtype: Literal["BF16", "F16", "F32"] = "BF16",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write the directory of a head.

    Args:
        directory: made if missing.
        target: the configuration of the model that it drafts for.
        kind: of attention: `mha` or `mla`.
        version: of EAGLE: 3, or 3.1 with its norms.
        draft_vocab_size: None for the whole vocabulary of the target, without `d2t`.
        spelling: of the layer's names, with a `model.` in front or without.
        seed: another seed is another head.
        own_embedding: whether it has an embedding.
        own_head: whether it has an output head.
        bits: of its projections in groups of 64 (32 where 64 does not divide a width), as MLX packs them; None keeps them plain.
        dtype: of plain weights.
        config: overrides of config.json keys; None takes a key away.

    Raises:
        UsageError: the directory cannot be written.
        CheckpointError: the overrides make a config that is not one of a head.
    """
    raw = draft_raw_config(target, kind=kind, version=version, draft_vocab_size=draft_vocab_size) | dict(config or {})
    raw = {key: value for key, value in raw.items() if value is not None or key == "rope_scaling"}
    made = DraftConfig.from_dict(raw, where="the overrides")
    weights = TinyDraftWeights(made, seed)
    values: dict[str, Floats] = {}
    for spec in draft_modules(made):
        if (spec.path == "embed_tokens" and not own_embedding) or (spec.path == "lm_head" and not own_head):
            continue
        values[f"{spec.path}.weight"] = weights.weight(spec)
        if spec.has_bias:
            values[f"{spec.path}.bias"] = weights.bias(spec)
    ids = weights.target_ids() if made.draft_vocab_size < made.vocab_size else None
    write_draft(directory, raw, values, ids, spelling=spelling, bits=bits, dtype=dtype)
    return Path(directory)


def write_draft(
    directory: str | Path,
    raw: Mapping[str, Any],
    values: Mapping[str, Floats],
    ids: np.ndarray[Any, np.dtype[np.int64]] | None,
    *,
    spelling: Spelling = "midlayer",
    bits: int | None = None,
    dtype: str = "BF16",
) -> None:
    """Write config.json and model.safetensors of a head.

    Args:
        directory: made if missing.
        raw: config.json without its quantization.
        values: float32 tensors by the names of `arch.draft_modules`.
        ids: of the target, of every token that the head drafts, ascending; None where they are the head's own.
        spelling: of the layer's names.
        bits: see `make_tiny_draft`.
        dtype: of plain weights, scales and biases.

    Raises:
        UsageError: the directory cannot be written.
    """
    root, tensors = Path(directory), dict[str, StoredTensor]()
    section: dict[str, Any] = {}
    for name, value in values.items():
        path, _, part = name.rpartition(".")
        group = next((size for size in (64, 32) if value.shape[-1] % size == 0), None)
        if bits is None or part != "weight" or value.ndim != 2 or group is None:
            tensors[name] = packing.store(value, dtype)
            continue
        codes, scales, biases = packing.quantize_affine(value, bits=bits, group_size=group, dtype=dtype)
        tensors |= {name: StoredTensor("U32", codes), f"{path}.scales": scales, f"{path}.biases": biases}
        section[path] = {"bits": bits, "group_size": group}
    if ids is not None:
        tensors["d2t"] = StoredTensor("I64", ids - np.arange(len(ids)))
        marks = np.zeros(raw["vocab_size"], np.uint8)
        marks[ids] = 1
        tensors["t2d"] = StoredTensor("BOOL", marks)
    stated = dict(raw)
    if section:
        stated["quantization"] = {"bits": bits, "group_size": 64, "mode": "affine", **section}
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        written = {spelled(name, spelling): tensor for name, tensor in tensors.items()}
        write_file(root / "model.safetensors", written, metadata={"format": "pt" if bits is None else "mlx"})
    except OSError as error:
        raise UsageError("the head cannot be written", found=error.strerror, where=error.filename or root) from error


def spelled(name: str, spelling: Spelling) -> str:
    """A tensor's name as one of the published files has it."""
    prefix, layer = ("model.", spelling.removeprefix("model.")) if spelling.startswith("model.") else ("", spelling)
    renamed = name.replace(f"{LAYER}.", f"{layer}.", 1)
    return renamed if name.startswith(_ABOVE) else prefix + renamed
