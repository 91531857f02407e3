"""Tiny checkpoints: one model in every layout, made again byte for byte, with files that the real ones have."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiktoken

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint import packing
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.tiny.make import LAYOUTS, make_tiny
from exo_kimi.checkpoint.tiny.tokenizer import ordinary_tokens
from exo_kimi.errors import CheckpointError, UsageError

NAMED = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}


def digest(directory: Path) -> str:
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(directory.iterdir()))
    return hashlib.sha256(content).hexdigest()


def values(directory: Path, source: ModuleSource) -> np.ndarray:
    """The float32 weight of a module, from its bytes."""

    def part(name: str) -> np.ndarray:
        stack = []
        for entry in source.parts[name]:
            raw = (directory / entry.file).read_bytes()[entry.start : entry.end]
            kind = {"BF16": "<u2", "F32": "<f4", "F16": "<f2", "U32": "<u4", "I32": "<i4", "F8_E4M3": "u1"}[entry.dtype]
            data = np.frombuffer(raw, kind).reshape(entry.shape)
            floats = entry.dtype in ("BF16", "F16", "F32")
            stack.append(packing.restore(packing.StoredTensor(entry.dtype, data)) if floats else data)
        return stack[0] if len(stack) == 1 else np.stack(stack)

    if source.layout == "plain":
        return part("weight")
    if source.layout == "fp8":
        return packing.dequantize_fp8(part("weight"), part("weight_scale_inv"))
    assert source.quant is not None
    how = {"bits": source.quant.bits, "group_size": source.quant.group_size}
    if source.layout == "mlx":
        return packing.dequantize_affine(part("weight"), part("scales"), part("biases"), **how)
    scales = part("weight_scale")
    return packing.dequantize_affine(part("weight_packed").view(np.uint32), scales, -8 * scales, **how)


def test_every_layout_of_one_seed_holds_the_same_model(make) -> None:
    exact = make(layout="bf16", dtype="F32")
    master = {source.spec.path: values(exact, source) for source in resolve(open_index(exact)).sources}
    for layout, step in (("bf16", 0.004), ("fp8", 0.07), ("int4", 0.2), ("mlx", 0.5)):
        directory = make(layout=layout, prefix=layout == "mlx", shards=3)
        for source in resolve(open_index(directory)).sources:
            expected = master[source.spec.path]
            error = np.abs(values(directory, source) - expected).max() / np.abs(expected).max()
            assert error < step, (layout, source.spec.path)


def test_absorbed_projections_are_the_rows_of_kv_b(make) -> None:
    plain = make(layout="bf16", dtype="F32")
    absorbed = make(absorbed=True, recipe="plain", dtype="F32")
    whole = {source.spec.path: source for source in resolve(open_index(plain)).sources}
    halves = {source.spec.path: source for source in resolve(open_index(absorbed)).sources}
    heads = values(plain, whole["model.layers.1.self_attn.kv_b_proj"]).reshape(2, 128, 128)
    embed_q = values(absorbed, halves["model.layers.1.self_attn.embed_q"])
    unembed_out = values(absorbed, halves["model.layers.1.self_attn.unembed_out"])
    np.testing.assert_array_equal(embed_q, heads[:, :64].swapaxes(1, 2))
    np.testing.assert_array_equal(unembed_out, heads[:, 64:])


def test_a_seed_makes_the_same_bytes_again_and_another_seed_others(make) -> None:
    first = digest(make(seed=5))
    assert digest(make(seed=5)) == first
    assert digest(make(seed=6)) != first


def test_an_older_tiny_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", shards=4, prefix=True)
    make_tiny(tmp_path / "b", shards=1, template=None)
    assert digest(make_tiny(tmp_path / "a", shards=1, template=None)) == digest(tmp_path / "b")


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "config.json"])
def test_what_is_not_a_tiny_checkpoint_is_never_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="not empty"):
        make_tiny(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "uniform7"},
        {"recipe": {"*": 7}},
        {"recipe": {"*": (4, 48)}},
        {"group_size": 16},
        {"layout": "gguf"},
        {"shards": 0},
        {"config": {"vocab_size": 300}},
    ],
)
def test_options_without_meaning_are_usage_errors(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_tiny(tmp_path / "x", **options)


def test_overrides_that_make_no_kimi_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        make_tiny(tmp_path / "x", config={"n_group": 3})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_is_made_in_a_second_or_so(tmp_path: Path, layout: str) -> None:
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        make_tiny(tmp_path / layout, layout=layout)
        best = min(best, time.process_time() - start)
    assert best < 1.5


def test_the_default_has_a_prime_number_of_layers_and_ragged_fp8_blocks(tmp_path: Path) -> None:
    index = open_index(make_tiny(tmp_path / "x", layout="fp8"))
    assert index.config.num_hidden_layers == 7
    assert [index.config.is_moe(layer) for layer in range(7)] == [False, *[True] * 6]
    codes = index.tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    blocks = index.tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert (codes.shape, blocks.shape) == ((160, 256), (2, 2))


def test_the_nested_config_is_that_of_k25(make) -> None:
    directory = make(prefix=True, vision=True, template="k25")
    raw = json.loads((directory / "config.json").read_text())
    assert raw["model_type"] == "kimi_k25"
    assert raw["quantization"]["bits"] == 4
    assert "language_model.model.layers.1.mlp.switch_mlp.up_proj" in raw["quantization"]
    assert (
        "quantization_config"
        in json.loads((make(prefix=True, layout="int4") / "config.json").read_text())["text_config"]
    )
    assert KimiConfig.from_dict(raw).key_prefix == "language_model."
    assert all(name.startswith(("language_model.", "vision_", "mm_")) for name in open_index(directory).tensors)


def test_mlx_reads_the_files(make) -> None:
    directory = make(dtype="F32", shards=1)
    arrays = mx.load(str(directory / "model.safetensors"))
    source = next(s for s in resolve(open_index(directory)).sources if s.spec.path.endswith("1.mlp.switch_mlp.up_proj"))
    stem = source.spec.path
    theirs = mx.dequantize(
        *(arrays[f"{stem}.{part}"] for part in ("weight", "scales", "biases")), group_size=64, bits=3
    )
    np.testing.assert_allclose(np.array(theirs), values(directory, source), atol=1e-6)


def test_the_256_special_tokens_end_the_vocabulary_under_their_real_names(make) -> None:
    directory = make(config={"vocab_size": 1000})
    config = json.loads((directory / "tokenizer_config.json").read_text())
    raw = json.loads((directory / "config.json").read_text())
    added = {int(number): token["content"] for number, token in config["added_tokens_decoder"].items()}
    assert sorted(added) == list(range(744, 1000))
    assert {place: added[744 + place] for place in NAMED} == NAMED
    assert len(set(added.values())) == 256
    assert added[744 + 5] == "<|reserved_token_749|>"
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (744, 745, 999)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 746


@pytest.mark.parametrize("vocab_size", [512, 640, 1024, 4096])
def test_tiktoken_reads_the_ranks_and_text_survives_them(make, vocab_size: int) -> None:
    lines = (make(config={"vocab_size": vocab_size}) / "tiktoken.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    assert sorted(ranks.values()) == list(range(vocab_size - 256))
    assert {bytes([value]) for value in range(256)} <= set(ranks)
    assert ranks[b"!"] == 0
    encoding = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    text = "The weather in Paris today is sunny. 今天天气怎么样？ 🌊 naïve Ωmega\n\ttabs"
    tokens = encoding.encode(text)
    assert encoding.decode(tokens) == text
    assert vocab_size == 512 or len(tokens) < len(text.encode())


def test_every_merged_token_is_reached_by_its_own_bytes() -> None:
    tokens = [token for token in ordinary_tokens(1024) if not token.startswith(b"\x00filler")]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # One piece a token would be looked up whole: two of them in a row must be merged from bytes.
    encoding = tiktoken.Encoding("tiny", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    reached = {rank for token in tokens for rank in encoding._encode_single_piece(b"\x00" + token + b"\x00")}
    assert len(reached) > 0.95 * len(tokens)


@pytest.mark.parametrize(
    ("template", "text"), [("instruct", "helpful"), ("thinking", "<think>"), ("{{ 1 }}", "{{ 1 }}")]
)
def test_the_template_asked_for_is_written(make, template: str, text: str) -> None:
    assert text in (make(template=template) / "chat_template.jinja").read_text()


def test_no_template_is_no_file(make) -> None:
    assert not (make(template=None) / "chat_template.jinja").exists()
