"""Write parameters as a checkpoint directory in a published layout, and read them back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.safetensors_io import write_file
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.checkpoint.tiny.layouts import LayoutWriter
from exo_kimi.checkpoint.tiny.make import stated_quantization, template_text
from exo_kimi.checkpoint.tiny.tokenizer import write_tokenizer
from exo_kimi.checkpoint.tiny.weights import Recipe, own_recipe, resolve_recipe
from exo_kimi.errors import UnsupportedModelError, UsageError
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.model.layers import Floats, Parameters
from exo_kimi.train.model.parameters import BIAS

_DEFAULT_SYSTEM = re.compile(r"{%- if not messages or messages\[0\].role != 'system' -%}.*?{%- endif -%}\n", re.DOTALL)
_GROUP_SIZE = 64  # of the mlx layout, as in published conversions


class StoredWeights:
    """Trained parameters, in the form that `LayoutWriter` takes."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters

    def weight(self, spec: ModuleSpec) -> Floats:
        """The weight of a module."""
        return self._parameters[f"{spec.path}.weight"]

    def correction_bias(self, spec: ModuleSpec) -> Floats:
        """The router's correction bias."""
        return self._parameters[f"{spec.path}.{BIAS}"]

    def decay(self, spec: ModuleSpec) -> tuple[Floats, Floats]:
        """A_log and dt_bias of Kimi Delta Attention."""
        return self._parameters[f"{spec.path}.A_log"], self._parameters[f"{spec.path}.dt_bias"]

    def bias(self, spec: ModuleSpec) -> Floats:
        """The bias vector of a linear."""
        return self._parameters[f"{spec.path}.bias"]


def write_vocabulary(directory: Path, raw_config: dict[str, Any], ordinary: Sequence[bytes]) -> None:
    """Write the tokenizer files, the template, and config.json without a quantization.

    The template is K2-Thinking's format but for the system prompt, which is not added where there is none: it would be a third
    of a short conversation.
    """
    directory.mkdir(parents=True, exist_ok=True)
    template = _DEFAULT_SYSTEM.sub("", template_text("thinking") or "")
    write_tokenizer(directory, raw_config["vocab_size"], chat_template=template, ordinary=ordinary)
    _write_config(directory, raw_config)


def write_checkpoint(
    directory: Path,
    source: Path,
    parameters: Parameters,
    *,
    layout: Literal["mlx", "int4", "bf16"],
    recipe: Recipe | None = None,
) -> None:
    """Write a whole checkpoint, with the vocabulary files and the architecture of another.

    Args:
        directory: made if missing; files of the same name are replaced.
        source: a directory with config.json, tokenizer files and template.
        layout: `int4` rounds as the aware training does: exact for weights that were trained so.
        recipe: bits per module of the mlx layout.
    """
    directory.mkdir(parents=True, exist_ok=True)
    raw = read_json(source / "config.json")
    raw = {key: value for key, value in raw.items() if key not in ("quantization", "quantization_config")}
    config = KimiConfig.from_dict(raw, where=source)
    chosen = own_recipe(recipe or {"int4": "int4", "bf16": "plain"}.get(layout, "mixed346"))
    writer = LayoutWriter(
        weights=StoredWeights(parameters),
        layout=layout,
        choose=resolve_recipe(chosen, _GROUP_SIZE),
        dtype="BF16",
        scales_dtype="BF16",
        prefix="",
        symmetric=True,
    )
    writer.add(stage_modules(config, 0, config.num_hidden_layers))
    write_file(directory / "model.safetensors", writer.tensors, metadata={"format": "mlx" if layout == "mlx" else "pt"})
    _write_config(directory, {**raw, **stated_quantization(layout, chosen, writer, _GROUP_SIZE)})
    for name in ("tiktoken.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).exists() and source != directory:
            (directory / name).write_bytes((source / name).read_bytes())


def requantize(directory: Path, output: Path, *, recipe: str) -> None:
    """Write a checkpoint of any layout again in MLX's, with the bits of a recipe.

    Raises:
        UsageError: the output is not new or cannot be written, or there is no such recipe.
        CheckpointError: the checkpoint cannot be read.
    """
    if output.exists():
        raise UsageError("the output exists", where=output, fix="give a new directory")
    chosen = load_recipe(recipe)
    if chosen.name in ("int4", "bf16"):
        raise UsageError("no bits of MLX's", expected="q34+q6, uniform-4 or another that quantizes", found=recipe)
    parameters = read_parameters(directory)
    try:
        write_checkpoint(output, directory, parameters, layout="mlx", recipe=chosen)
    except OSError as error:
        raise UsageError("the checkpoint cannot be written", found=error.strerror, where=output) from error


def check_trainable(checkpoint: Checkpoint) -> None:
    """Refuse a family that NumPy does not learn here.

    Raises:
        UnsupportedModelError: it is no Kimi K2.
    """
    if checkpoint.config.has_states:
        raise UnsupportedModelError(
            "a Kimi K2 alone is trained here, and draft heads for one",
            found=f"model_type {checkpoint.config.model_type}",
            where=checkpoint.directory,
            fix="`exo-kimi convert` writes it with other bits",
        )


def read_parameters(directory: Path) -> Parameters:
    """Read the float32 values of every parameter of a checkpoint in any layout, by the names of `models.kimi_k2.Model`.

    Raises:
        CheckpointError: see `runtime.loading.loader.load`.
        UnsupportedModelError: see `check_trainable`.
    """
    check_trainable(Checkpoint(directory))
    model = load(directory, dtype="float32")
    values: Parameters = {}
    for path, module in model.named_modules():
        if "weight" not in module:
            continue
        weight = module.weight
        if isinstance(module, nn.Module) and "scales" in module:
            weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"), group_size=module.group_size, bits=module.bits
            )
        values[f"{path}.weight"] = np.array(weight.astype(mx.float32))
        if BIAS in module:
            values[f"{path}.{BIAS}"] = np.array(module[BIAS])
    return values


def _write_config(directory: Path, raw: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
