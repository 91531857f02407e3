"""Tiny Kimi checkpoints in every published layout: random but seeded, complete, made in a second.

They stand in for half a terabyte in tests, demos and benchmarks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import stage_modules
from exo_kimi.arch.vision import VisionConfig
from exo_kimi.checkpoint import packing
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.checkpoint.tiny.config import FP8_CONFIG, INT4_CONFIG, MXFP4_CONFIG, nest, nest_k3, text_config
from exo_kimi.checkpoint.tiny.layouts import LayoutWriter
from exo_kimi.checkpoint.tiny.tokenizer import write_tokenizer
from exo_kimi.checkpoint.tiny.weights import RECIPES, Recipe, TinyWeights, own_recipe, resolve_recipe, with_absorbed
from exo_kimi.errors import UsageError

Layout = Literal["mlx", "int4", "mxfp4", "fp8", "bf16"]
Family = Literal["k2", "linear", "k3"]
_MODEL_TYPES: dict[Family, dict[str, str]] = {
    "k2": {},
    "linear": {"model_type": "kimi_linear"},
    "k3": {"model_type": "kimi_k3"},
}
LAYOUTS: tuple[Layout, ...] = ("mlx", "int4", "mxfp4", "fp8", "bf16")
TEMPLATES = ("instruct", "thinking", "k25")
_MARK = "_exo_kimi_tiny"  # in config.json: what carries it may be replaced, a real checkpoint never
_PREFIX = "language_model."
_THINK_PROMPT = (
    "{%- if add_generation_prompt -%}{{ '<think></think>' if thinking is false else '<think>' }}{%- endif -%}"
)


def make_tiny(
    directory: str | Path,
    *,
    layout: Layout = "mlx",
    recipe: Recipe | None = None,
    seed: int = 0,
    absorbed: bool = False,
    prefix: bool = False,
    vision: bool = False,
    shards: int = 2,
    dtype: Literal["BF16", "F16", "F32"] = "BF16",
    scales_dtype: Literal["BF16", "F16", "F32"] | None = None,
    group_size: int = 64,
    config: Mapping[str, Any] | None = None,
    family: Family = "k2",
    extra_tensors: Mapping[str, StoredTensor] | None = None,
    template: str | None = "instruct",
) -> Path:
    """Write a checkpoint directory.

    Args:
        directory: made if missing; else empty, or an older tiny checkpoint, which is replaced.
        layout: `mlx` (stacked experts, quantized by recipe), `int4` and `mxfp4` (compressed-tensors, per expert), `fp8` (e4m3
            blocks) or `bf16` (plain, per expert).
        recipe: bits per module for `mlx`, see `resolve_recipe`; `mixed346` by default, which is the planner's `q34+q6`, and
            `plain` for stacked floats, its `bf16`.
        seed: the same seed gives the same master weights in each layout.
        absorbed: (mlx) `embed_q` and `unembed_out` instead of `kv_b_proj`.
        prefix: nest the model as K2.5 and later do: model_type kimi_k25, text_config, `language_model.` names.
        vision: add a vision tower and its projector, as K2.5 and later have them; nests the model.
        shards: files; 1 writes `model.safetensors` without an index.
        dtype: the dtype of plain weights. The router's correction bias is always F32.
        scales_dtype: the dtype of scales and biases; `dtype` by default.
        group_size: (mlx) columns that share a scale, unless the recipe says otherwise.
        config: overrides of config.json keys of the text model. `quantization` or `quantization_config` here replaces what
            would be written of both, right or wrong; `quantization: {}` says nothing.
        family: `k2`, `k3` (inspected and planned, not run), or `linear` for a Kimi Linear, as `model_type` kimi_linear in
            `config` is one too.
        extra_tensors: more tensors, by full name.
        template: `instruct`, `thinking`, `k25`, the text of a template, or None for no file.

    Returns:
        The directory.

    Raises:
        UsageError: the directory holds anything but an older tiny checkpoint or cannot be written, or an option has no such
            value.
        CheckpointError: the overrides make a config that is not a Kimi's.
    """
    root = Path(directory)
    if layout not in LAYOUTS or shards < 1:
        raise UsageError(
            "no such layout or number of shards",
            expected=f"{', '.join(LAYOUTS)}; 1 shard or more",
            found=f"{layout}, {shards} shards",
        )
    _check_recipe(layout, recipe)
    recipe = own_recipe(recipe) if recipe is not None else None
    with _writing(root):
        _clear(root)
    overrides: dict[str, Any] = {**_MODEL_TYPES[family], **(config or {})}
    if family == "k3" and layout != "mxfp4":
        raise UsageError("a tiny Kimi K3 is made as it is published", expected="layout mxfp4", found=layout)
    prefix = prefix or vision or overrides.get("model_type") == "kimi_k25"
    if prefix and overrides.get("model_type") == "kimi_linear":
        raise UsageError("a Kimi Linear is not nested and takes no pictures", fix="leave out --prefix and --vision")
    hints: dict[str, Any] = {
        key: overrides.pop(key) for key in ("quantization", "quantization_config") if key in overrides
    }
    raw = {_MARK: f"seed {seed}", **text_config(overrides, dtype=dtype)}
    if prefix:
        raw["model_type"] = "kimi_k2"
    outer = nest_k3(raw) if family == "k3" else raw
    kimi = KimiConfig.from_dict(outer, where="the overrides")
    specs = stage_modules(kimi, 0, kimi.num_hidden_layers)
    if recipe is None:
        recipe = {"mlx": "mixed346", "int4": "int4"}.get(layout, "plain")
    writer = LayoutWriter(
        weights=TinyWeights(kimi, seed),
        layout=layout,
        choose=resolve_recipe(recipe, group_size),
        dtype=dtype,
        scales_dtype=scales_dtype or dtype,
        prefix=_PREFIX if prefix or family == "k3" else "",
        moe_layers=None
        if kimi.linear_attention is None
        else frozenset(filter(kimi.is_moe, range(kimi.num_hidden_layers))),
    )
    writer.add(with_absorbed(kimi, specs) if absorbed else specs)
    tensors = writer.tensors
    if vision:
        tensors.update(vision_tensors(_vision_config(raw, kimi), seed, dtype))
    tensors.update(extra_tensors or {})
    raw.update(hints or stated_quantization(layout, recipe, writer, group_size))
    with _writing(root):
        stated = nest_k3(raw) if family == "k3" else nest(raw) if prefix else raw
        (root / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        _write_shards(root, tensors, shards, "mlx" if layout == "mlx" else "pt")
        write_tokenizer(root, kimi.vocab_size, chat_template=template_text(template))
    return root


def _vision_config(raw: Mapping[str, Any], kimi: KimiConfig) -> VisionConfig:
    config = VisionConfig.from_dict(nest(raw), hidden_size=kimi.hidden_size)
    if config is None:
        raise UsageError("the nested config describes no vision")
    return config


def _check_recipe(layout: Layout, recipe: Recipe | None) -> None:
    """Refuse a named recipe that the layout cannot follow, rather than ignore it."""
    followed = {"int4": ("int4", "plain"), "mxfp4": ("plain",), "fp8": ("plain",), "bf16": ("plain",)}
    own = own_recipe(recipe) if recipe is not None else None
    unknown_here = isinstance(own, str) and own in RECIPES and own not in followed.get(layout, RECIPES)
    if unknown_here or (layout in followed and hasattr(own, "quant")):
        raise UsageError(
            f"the {layout} layout cannot follow this recipe",
            expected=" or ".join("bf16" if name == "plain" else name for name in followed[layout]),
            found=getattr(recipe, "name", recipe),
            fix="leave the recipe out, or choose the mlx layout",
        )


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn an OSError (a directory that cannot be written, a full disk) into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            "the checkpoint cannot be written",
            found=error.strerror,
            where=error.filename or root,
            fix="give another directory, or make room",
        ) from error


def stated_quantization(layout: Layout, recipe: Recipe, writer: LayoutWriter, group_size: int) -> dict[str, Any]:
    """The quantization keys of config.json, as the tool that writes this layout writes them."""
    if layout == "int4":
        return {"quantization_config": INT4_CONFIG}
    if layout == "mxfp4":
        return {"quantization_config": MXFP4_CONFIG}
    if layout == "fp8":
        return {"quantization_config": FP8_CONFIG}
    chosen = writer.quantization
    if not any(chosen.values()):
        return {}
    uniform = isinstance(recipe, str) and recipe.startswith("uniform")
    bits = int(recipe.removeprefix("uniform")) if isinstance(recipe, str) and uniform else 4
    entries: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for path, pair in chosen.items():
        if pair is None:
            entries[path] = False
        elif pair != (bits, group_size):
            entries[path] = {"group_size": pair[1], "bits": pair[0]}
    return {"quantization": entries, "quantization_config": entries}


def _write_shards(root: Path, tensors: dict[str, StoredTensor], shards: int, made_by: str) -> None:
    if shards == 1:
        write_file(root / "model.safetensors", tensors, metadata={"format": made_by})
        return
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    files: list[dict[str, StoredTensor]] = [{} for _ in range(shards)]
    position = 0
    for name, tensor in tensors.items():
        files[min(position * shards // max(total_bytes, 1), shards - 1)][name] = tensor
        position += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_file(root / file, part, metadata={"format": made_by})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (root / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def vision_tensors(config: VisionConfig, seed: int, dtype: str) -> dict[str, StoredTensor]:
    """Random weights of a vision tower and its projector, under the published names.

    Norms are near 1 and biases near 0; a product keeps the size of what it is given.
    """
    generator = np.random.default_rng([seed, 1])

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        noise = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return 0.1 * noise + np.float32("norm" in name and name.endswith("weight"))
        if name.endswith("pos_emb.weight"):
            return noise
        return noise / np.float32(np.sqrt(np.prod(shape[1:])))

    return {name: packing.store(values(name, shape), dtype) for name, shape in config.shapes.items()}


def template_text(template: str | None) -> str | None:
    if template not in TEMPLATES:
        return template
    name = "thinking" if template == "k25" else template
    text = resources.files("exo_kimi.checkpoint").joinpath("data", f"{name}.jinja").read_text(encoding="utf-8")
    return text.replace("<|media_start|>", "<|media_begin|>") + _THINK_PROMPT if template == "k25" else text


def _clear(root: Path) -> None:
    """Make way for a new checkpoint; nothing but an older tiny one is ever deleted."""
    if root.exists() and not root.is_dir():
        raise UsageError("not a directory", found=root, fix="give another directory")
    root.mkdir(parents=True, exist_ok=True)
    old = list(root.iterdir())
    if not old:
        return
    known = ("config.json", "generation_config.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja")
    foreign = [path.name for path in old if path.name not in (*known, INDEX_NAME) and path.suffix != ".safetensors"]
    if foreign or not _is_tiny(root):
        raise UsageError(
            "the directory is not empty",
            expected="an empty directory or an older tiny checkpoint",
            found=", ".join(sorted(foreign)[:5]) or "a checkpoint that is not tiny",
            where=root,
            fix="give another directory",
        )
    for path in old:
        path.unlink()


def _is_tiny(root: Path) -> bool:
    try:
        raw = read_json(root / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and (_MARK in raw or _MARK in (raw.get("text_config") or {}))
