"""Conversions as a user meets them: exact copies, links, interruptions, dry runs, memory."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.packing import decode_e4m3
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.command import ConvertOptions, outlook, run_convert
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.run import convert
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import NotFiniteError, UsageError
from exo_kimi.planner.weights.recipes import load_recipe

Convert = Callable[..., Checkpoint]


def raw(checkpoint: Checkpoint, name: str) -> bytes:
    with RangeReader(checkpoint.directory) as reader:
        return reader.read(checkpoint.index.tensors[name]).tobytes()


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_int4_becomes_mlx_4_bit_group_32_with_the_same_codes_and_scales(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = Checkpoint(source_of("int4"))
    output = converted(source.directory, tmp_path / "out", "int4")
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts = [f"model.layers.1.mlp.experts.{expert}.{name}" for expert in range(4)]
        stack = f"model.layers.1.mlp.switch_mlp.{name}"
        assert raw(output, f"{stack}.weight") == b"".join(raw(source, f"{p}.weight_packed") for p in parts)
        scales = b"".join(raw(source, f"{p}.weight_scale") for p in parts)
        assert raw(output, f"{stack}.scales") == scales
        biases = np.frombuffer(raw(output, f"{stack}.biases"), ml_dtypes.bfloat16)
        assert (biases == np.frombuffer(scales, ml_dtypes.bfloat16).astype(np.float32) * -8).all()
    before = {each.spec.path: each for each in source.manifest().sources}
    with RangeReader(source.directory) as old, RangeReader(output.directory) as new:
        for each in output.manifest().sources:
            if each.spec.kind == "experts":
                rows, other = SourceRows(new, each), SourceRows(old, before[each.spec.path])
                for matrix in range(4):
                    assert (rows.floats(matrix, 0, rows.out) == other.floats(matrix, 0, rows.out)).all()


def test_fp8_becomes_the_float32_product_rounded_once_for_all_codes_and_ragged_blocks(
    small_config: dict[str, int], converted: Convert, tmp_path: Path
) -> None:
    """kv_a_proj_with_mqa has 160 rows: its last block has 32. Every code but the two NaN is in it."""
    source = make_tiny(tmp_path / "fp8", layout="fp8", config=small_config)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    checkpoint = Checkpoint(source)
    entry = checkpoint.index.tensors[f"{name}.weight"]
    codes = np.resize(np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8), entry.shape)
    scales = np.random.default_rng(0).uniform(1e-4, 1e-3, (2, 1)).astype(np.float32)
    for tensor, data in ((f"{name}.weight", codes), (f"{name}.weight_scale_inv", scales)):
        place = checkpoint.index.tensors[tensor]
        with (source / place.file).open("r+b") as stream:
            stream.seek(place.start)
            stream.write(data.tobytes())
    output = converted(source, tmp_path / "out", "bf16")
    wanted = decode_e4m3(codes) * scales.repeat(128, 0)[:160].repeat(128, 1)[:, : entry.shape[1]]
    found = np.frombuffer(raw(output, f"{name}.weight"), ml_dtypes.bfloat16).reshape(entry.shape)
    assert (found == wanted.astype(ml_dtypes.bfloat16)).all()


def test_the_same_recipe_moves_every_packed_byte(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = Checkpoint(source_of("mlx 5, absorbed"))
    output = converted(source.directory, tmp_path / "out", "uniform-5")
    assert {name: raw(output, name) for name in output.index.tensors} == {
        name: raw(source, name) for name in source.index.tensors
    }


def test_a_packed_kv_b_proj_is_kept_exactly_when_asked(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = Checkpoint(source_of("mlx 3, 4, 6"))
    output = converted(source.directory, tmp_path / "out", "q34+q6", keep_kv_b=True)
    for name in source.index.tensors:
        assert raw(output, name) == raw(source, name)


@pytest.mark.parametrize("name", ["int4", "k2.5 int4 with a tower", "mlx 3, 4, 6", "fp8"])
def test_a_link_copies_no_weight(name: str, source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_of(name)
    told = run_convert(ConvertOptions(directory=source, output=tmp_path / "out", recipe=None, link=True))
    assert "0 bytes of weights were copied" in told
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    assert weights and all(path.is_symlink() and path.samefile(source / path.name) for path in weights)
    output = Checkpoint(tmp_path / "out")
    assert not doctor(output.directory).findings
    assert output.manifest().resident_bytes == Checkpoint(source).manifest().resident_bytes
    again = run_convert(ConvertOptions(directory=source, output=tmp_path / "out", recipe=None, link=True))
    assert "nothing was changed" in again


def test_a_linked_int4_runs_in_mlx_lm_as_it_does_here(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from exo_kimi.runtime.loading.loader import load

    run_convert(ConvertOptions(directory=source_of("int4"), output=tmp_path / "out", recipe=None, link=True))
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    ids = mx.array([[5, 9, 100, 33]])
    own = np.array(load(source_of("int4"), dtype="float32")(ids))
    assert np.abs(np.array(theirs(ids)) - own).max() < 1e-4 * own.std()


def test_a_link_with_other_bits_is_refused(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    options = ConvertOptions(
        directory=source_of("int4"), output=tmp_path / "out", recipe=load_recipe("q34+q6"), link=True
    )
    with pytest.raises(UsageError, match="bits that the source has"):
        run_convert(options)


def test_a_dry_run_says_the_bytes_and_writes_nothing(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    recipe, source = load_recipe("q34+q6"), source_of("fp8")
    conversion = make_conversion(Checkpoint(source), tmp_path / "out", recipe, shard_bytes=100_000)
    foreseen = outlook(conversion)
    assert not (tmp_path / "out").exists()
    convert(conversion)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == foreseen.files > 3
    assert sum(path.stat().st_size for path in files) == foreseen.file_bytes
    assert f"{foreseen.text_bytes:,}" in foreseen.to_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_is_resumed_to_the_same_bytes(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    """`exo-kimi bench convert` does it fifty times."""
    source = source_of("bf16")

    def job(output: Path) -> None:
        convert(make_conversion(Checkpoint(source), output, load_recipe("q34+q6"), shard_bytes=60_000), workers=2)

    began = time.monotonic()
    job(tmp_path / "whole")
    whole_s, chance = time.monotonic() - began, random.Random(0)
    wanted, killed = everything(tmp_path / "whole"), 0
    for number in range(30):  # a child that was done before its kill says nothing
        output = tmp_path / f"cut{number}"
        for _ in range(3):
            child = os.fork()
            if child == 0:
                try:
                    job(output)
                finally:
                    os._exit(0)
            time.sleep(chance.uniform(0, whole_s))
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        job(output)
        assert everything(output) == wanted
        if number >= 2 and killed >= 3:
            break
    assert killed >= 3


def test_a_weight_that_is_not_finite_stops_it(small_config: dict[str, int], converted: Convert, tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "bad", layout="bf16", config=small_config)
    place = Checkpoint(source).index.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with (source / place.file).open("r+b") as stream:
        stream.seek(place.start + 40)
        stream.write(b"\x80\x7f")
    with pytest.raises(NotFiniteError, match=r"experts\.0\.up_proj|experts\.2\.up_proj"):
        converted(source, tmp_path / "out", "uniform-4")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_compressed_tensors_of_another_shape_are_refused(
    small_config: dict[str, int], converted: Convert, tmp_path: Path
) -> None:
    from exo_kimi.errors import QuantizationError

    source = make_tiny(tmp_path / "odd", layout="int4", config=small_config)
    place = Checkpoint(source).index.tensors["model.layers.1.mlp.experts.1.up_proj.weight_shape"]
    with (source / place.file).open("r+b") as stream:
        stream.seek(place.start)
        stream.write(np.array([64, 256], np.int32).tobytes())
    with pytest.raises(QuantizationError, match="weight_shape"):
        converted(source, tmp_path / "out", "int4")


def test_a_float_mode_checkpoint_is_a_source_too(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        packed = converted(source_of("bf16"), tmp_path / mode, mode)
        again = converted(packed.directory, tmp_path / f"{mode}-bf16", "bf16")
        with RangeReader(packed.directory) as old, RangeReader(again.directory) as new:
            for one, other in zip(packed.manifest().sources, again.manifest().sources, strict=True):
                assert one.spec.path == other.spec.path
                left, right = SourceRows(old, one), SourceRows(new, other)
                wanted = left.floats(0, 0, left.out).astype(ml_dtypes.bfloat16)
                assert (right.floats(0, 0, right.out) == wanted).all()


def test_rows_of_zeros_stay_zeros_and_the_doctor_is_silent(
    small_config: dict[str, int], converted: Convert, tmp_path: Path
) -> None:
    source = make_tiny(tmp_path / "zeros", layout="bf16", config=small_config)
    place = Checkpoint(source).index.tensors["model.embed_tokens.weight"]
    with (source / place.file).open("r+b") as stream:
        stream.seek(place.start)
        stream.write(bytes(place.shape[1] * 2 * 5))
    for recipe in ("uniform-3", "mxfp4", "nvfp4"):
        output = converted(source, tmp_path / recipe, recipe)
        embedding = next(each for each in output.manifest().sources if each.spec.kind == "embedding")
        with RangeReader(output.directory) as reader:
            assert (SourceRows(reader, embedding).floats(0, 0, 5) == 0).all()
        assert not doctor(output.directory, deep=True).findings


def test_one_weight_file_without_an_index_is_a_source(small_config: dict[str, int], tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "one", layout="bf16", config=small_config, shards=1)
    told = run_convert(ConvertOptions(directory=source, output=tmp_path / "out", recipe=load_recipe("uniform-6")))
    assert "read back and compared" in told
