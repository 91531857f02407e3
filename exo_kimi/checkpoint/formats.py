"""Formats that exo-kimi does not read, by name: one table, and how each is recognised from names, dtypes, config.json and files.

To add one, add a `ForeignFormat` to FORMATS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exo_kimi.errors import ForeignFormatError

TAKE = "take an MLX conversion (mlx-community), or the weights as Moonshot publishes them (INT4 or FP8)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFormat:
    """A format that is known and not read.

    Args:
        name: as its makers call it.
        why: what keeps it from being read, in a few words.
        suffixes: what only its tensor names end in, after the last dots; one is enough.
        methods: values of `quant_method`, `quant_algo` or `format` in config.json; they count only where tensors cannot be read.
        files: names or patterns of files beside the weights; they count as methods do.
        weights: patterns of weight files of its own; they count where there is no safetensors file.
        take: what to take instead.
    """

    name: str
    why: str
    suffixes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    take: str = TAKE

    def error(self, evidence: str, *, where: object) -> ForeignFormatError:
        """The one finding about a checkpoint of this format."""
        return ForeignFormatError(
            f"the weights are in {self.name}, which exo-kimi does not read",
            expected="MLX, compressed-tensors INT4, FP8 in blocks, or plain floats",
            found=f"{evidence}: {self.why}",
            where=where,
            fix=self.take,
        )


FORMATS = (
    ForeignFormat(
        name="NVIDIA ModelOpt NVFP4",
        why="4-bit floats with a second factor for each tensor, which MLX's nvfp4 does not have",
        suffixes=("weight_scale_2", "input_scale"),
        methods=("modelopt", "modelopt_fp4", "nvfp4"),
        files=("hf_quant_config.json",),
    ),
    ForeignFormat(
        name="compressed-tensors NVFP4",
        why="4-bit floats with a global factor for each tensor, which MLX's nvfp4 does not have",
        suffixes=("weight_global_scale", "input_global_scale"),
        methods=("nvfp4-pack-quantized",),
    ),
    ForeignFormat(
        name="JANGTQ (JANG)",
        why="codes of a rotated codebook, which need JANG's own kernels",
        suffixes=("tq_packed", "tq_norms", "tq_bits"),
        methods=("jang", "jangtq", "mxtq"),
        files=("jang_config.json", "jang_cfg.json", "jangtq_config.json"),
    ),
    ForeignFormat(
        name="AMD Quark",
        why="its own packing of 4-bit floats or integers",
        methods=("quark",),
    ),
    ForeignFormat(
        name="GPTQ",
        why="codes are packed along the input, with zero points of their own",
        suffixes=("g_idx",),
        methods=("gptq", "gptq_marlin", "gptqmodel"),
        files=("quantize_config.json",),
    ),
    ForeignFormat(
        name="AWQ",
        why="codes are packed along the output, in an order of their own",
        suffixes=("qweight", "qzeros"),
        methods=("awq", "awq_marlin"),
    ),
    ForeignFormat(
        name="bitsandbytes",
        why="codes of a table, with nested factors",
        suffixes=(
            "absmax",
            "quant_map",
            "nested_absmax",
            "nested_quant_map",
            "bitsandbytes__nf4",
            "bitsandbytes__fp4",
            "SCB",
        ),
        methods=("bitsandbytes",),
    ),
    ForeignFormat(
        name="ExLlama (EXL2, EXL3)",
        why="its own packing, with rotations",
        suffixes=("q_scale_max", "q_group_map", "trellis", "suh", "svh"),
        methods=("exl2", "exl3"),
    ),
    ForeignFormat(name="HQQ", why="its own packing", suffixes=("W_q",), methods=("hqq",)),
    ForeignFormat(name="AQLM", why="additive codebooks", suffixes=("codebooks",), methods=("aqlm",)),
    ForeignFormat(name="VPTQ", why="vector codebooks", suffixes=("centroids", "res_centroids"), methods=("vptq",)),
    ForeignFormat(name="QuIP#", why="lattice codebooks", suffixes=("Qidxs",), methods=("quip", "quip_sharp")),
    ForeignFormat(name="SpQR", why="outliers beside codes", suffixes=("dense_weights",), methods=("spqr",)),
    ForeignFormat(
        name="Intel AutoRound", why="its own packing", methods=("auto-round", "auto_round", "intel/auto-round")
    ),
    ForeignFormat(name="torchao", why="pickled tensor classes", methods=("torchao",)),
    ForeignFormat(
        name="FBGEMM FP8", why="a factor for each row", suffixes=("input_scale_ub",), methods=("fbgemm_fp8",)
    ),
    ForeignFormat(name="EETQ", why="its own packing of 8 bits", methods=("eetq",)),
    ForeignFormat(name="HIGGS", why="codes of a rotated grid", methods=("higgs",)),
    ForeignFormat(name="BitNet", why="ternary weights", methods=("bitnet", "bitnet-158")),
    ForeignFormat(
        name="compressed-tensors INT8 or FP8 for each channel",
        why="8-bit values with one factor for each row",
        methods=("int-quantized", "naive-quantized", "float-quantized"),
    ),
    ForeignFormat(
        name="compressed-tensors with zero points",
        why="INT4 codes with a zero point for each group",
        suffixes=("weight_zero_point",),
    ),
    ForeignFormat(
        name="GGUF (llama.cpp)", why="llama.cpp's own blocks of codes", weights=("*.gguf",), methods=("gguf",)
    ),
    ForeignFormat(
        name="npz (MLX before 2024)",
        why="NumPy archives",
        weights=("*.npz",),
        take="convert it again with today's mlx-lm, or " + TAKE,
    ),
    ForeignFormat(name="HDF5 or Keras", why="TensorFlow's container", weights=("*.h5", "*.keras")),
    ForeignFormat(name="Flax", why="msgpack", weights=("*.msgpack",)),
    ForeignFormat(name="ONNX", why="a graph with its weights", weights=("*.onnx", "*.onnx_data")),
    ForeignFormat(name="Core ML", why="a compiled model", weights=("*.mlmodel", "*.mlpackage")),
)

# What a file begins with that is called .safetensors and is none: eight bytes are enough.
IMPOSTORS = (
    (
        b"version ",
        "a Git LFS pointer, not the weights it points to",
        "`git lfs pull`, or download it with `hf download`",
    ),
    (b"<!DOCTYP", "a web page that was saved under this name", "download the file itself, with `hf download`"),
    (b"<!doctyp", "a web page that was saved under this name", "download the file itself, with `hf download`"),
    (b"<html", "a web page that was saved under this name", "download the file itself, with `hf download`"),
    (b"<?xml", "a server's XML answer that was saved under this name", "download the file itself, with `hf download`"),
    (b'{"', "a server's JSON answer that was saved under this name", "download the file itself, with `hf download`"),
    (
        b"Entry no",
        "a server's answer (not found) that was saved under this name",
        "download the file itself, with `hf download`",
    ),
    (b"GGUF", "a GGUF file under another name", TAKE),
    (b"PK\x03\x04", "a zip archive (pickled weights, or npz) under another name", TAKE),
    (b"\x93NUMPY", "a NumPy file under another name", TAKE),
    (b"\x80\x02", "a pickle under another name, which is never read", TAKE),
    (b"\x1f\x8b", "a gzip file: it was saved compressed", "download it again, or unpack it"),
    (bytes(8), "zeros where the header should be: its download never began", "download this file again"),
)


def impostor(prefix: bytes) -> tuple[str, str] | None:
    """What a file is that begins with these eight bytes and is no safetensors file, and the fix; None for a real one."""
    for magic, what, fix in IMPOSTORS:
        if prefix.startswith(magic):
            return what, fix
    return None


def format_of_tensors(names: Collection[str], *, where: object) -> ForeignFormatError | None:
    """The error for tensors of which a hundredth or more have names that only one foreign format has; None where none does."""
    counts = Counter([name.rpartition(".")[2] for name in names])
    least = max(2, len(names) // 100)  # a stray tensor is one that nothing consumes
    for each in FORMATS:
        found = [suffix for suffix in each.suffixes if counts.get(suffix, 0) >= least]
        if found:
            suffix = max(found, key=lambda suffix: counts[suffix])
            example = next(name for name in names if name.endswith(f".{suffix}"))
            return each.error(f"{counts[suffix]:,} of {len(names):,} tensors such as {example}", where=where)
    return None


def format_declared(root: Path, raw_config: Mapping[str, Any]) -> ForeignFormatError | None:
    """The error for a checkpoint whose config.json, or a file beside it, names a foreign format; asked only where the tensors
    cannot be read, since conversions keep such words."""
    declared = dict(_declared(raw_config))
    present = {path.name for path in root.iterdir()}
    for each in FORMATS:
        for method in each.methods:
            if method in declared:
                return each.error(f"config.json has {declared[method]} {method!r}", where="config.json")
        for pattern in each.files:
            if pattern in present:
                return each.error(f"{pattern} lies beside the weights", where=pattern)
    return None


def format_of_files(root: Path, names: Collection[str]) -> ForeignFormatError | None:
    """The error for a directory whose weight files are of a foreign format; None where none is."""
    for each in FORMATS:
        found = sorted(name for name in names for pattern in each.weights if fnmatchcase(name.lower(), pattern))
        if found:
            more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
            return each.error(f"{found[0]}{more}", where=root)
    return None


def _declared(raw_config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What config.json calls its quantization, in lower case, with the key that says it."""
    text = raw_config.get("text_config")
    for scope in (raw_config, text if isinstance(text, Mapping) else {}):
        for section in ("quantization_config", "quantization", "compression_config"):
            values = scope.get(section)
            for key in ("format", "quant_algo", "quant_method", "quant_type", "weight_format"):
                value = values.get(key) if isinstance(values, Mapping) else None
                if isinstance(value, str):
                    yield value.lower(), f"{section}.{key}"
        if isinstance(scope.get("weight_format"), str):
            yield scope["weight_format"].lower(), "weight_format"
