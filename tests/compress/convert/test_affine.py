"""Affine codes: mx.quantize's own, bit for bit, and the search that beats them."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.packing import unpack_bits
from exo_kimi.compress.convert import float_modes
from exo_kimi.compress.convert.affine import AffineCodes, quantize_as_mlx, quantize_searched

KINDS = ("normal", "t5", "positive")


def weights(kind: str, rows: int = 256, into: int = 512) -> np.ndarray:
    chance = np.random.default_rng(3)
    tailed = {"t5": 5, "t3": 3}
    drawn = chance.standard_t(tailed[kind], (rows, into)) if kind in tailed else chance.standard_normal((rows, into))
    values = np.abs(drawn) if kind == "positive" else drawn
    return (values * 0.02).astype(ml_dtypes.bfloat16).astype(np.float32)


def columns(values: np.ndarray, group_size: int) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(-1, group_size).T)


def error(found: AffineCodes, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.values() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_rounding_is_mx_quantize_bit_for_bit(bits: int, kind: str) -> None:
    values = weights(kind, 32)
    values[3] = 0
    values[4] = 0.5
    for group_size in (32, 64, 128):
        packed, scales, biases = mx.quantize(mx.array(values).astype(mx.bfloat16), group_size, bits)
        found = quantize_as_mlx(columns(values, group_size), bits, "BF16")
        codes = unpack_bits(np.array(packed), bits).reshape(-1, group_size).T
        assert (found.codes == codes).all()
        assert (found.scales == np.array(scales.astype(mx.float32)).reshape(-1)).all()
        assert (found.biases == np.array(biases.astype(mx.float32)).reshape(-1)).all()


@pytest.mark.parametrize(("bits", "most"), [(2, 0.88), (3, 0.9), (4, 0.94), (5, 0.96), (6, 0.96), (8, 0.8)])
@pytest.mark.parametrize("kind", ["normal", "t5", "t3"])
def test_the_search_has_less_error_at_equal_bytes(bits: int, most: float, kind: str) -> None:
    groups = columns(weights(kind), 64)
    theirs, found = quantize_as_mlx(groups, bits, "BF16"), quantize_searched(groups, bits, "BF16")
    assert error(found, groups) <= most * error(theirs, groups)
    by_group = np.square(found.values() - groups).sum(0) <= np.square(theirs.values() - groups).sum(0) * 1.02
    assert by_group.mean() > 0.8


def test_the_codes_are_nearest_for_the_scales_that_are_stored() -> None:
    groups = columns(weights("normal"), 64)
    found = quantize_searched(groups, 8, "BF16")
    assert (found.scales.astype(ml_dtypes.bfloat16).astype(np.float32) == found.scales).all()
    assert (found.biases.astype(ml_dtypes.bfloat16).astype(np.float32) == found.biases).all()
    exact = np.clip(np.rint((groups.astype(np.float64) - found.biases) / found.scales), 0, 255)
    assert (np.abs(exact - found.codes) <= 1).all() and (exact == found.codes).mean() > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_groups_of_equal_weights_and_zeros_are_met(bits: int) -> None:
    groups = np.zeros((64, 4), np.float32)
    groups[:, 1] = 0.5
    groups[:, 2] = -3
    groups[0, 3] = 1
    found = quantize_searched(groups, bits, "BF16")
    assert np.isfinite(found.values()).all()
    assert np.abs(found.values() - groups)[:, :3].max() == 0
    assert np.abs(found.values() - groups)[:, 3].max() < 0.01


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    groups = columns(weights("normal"), 64)
    importance = np.ones_like(groups)
    importance[:8] = 100
    plain, weighed = (quantize_searched(groups, 3, "BF16", importance=each) for each in (None, importance))

    def squared(found: AffineCodes) -> float:
        return float((np.square(found.values() - groups) * importance).sum())

    assert squared(weighed) < 0.9 * squared(plain)
    same = quantize_searched(groups, 3, "BF16", importance=np.ones_like(groups))
    assert abs(error(same, groups) / error(plain, groups) - 1) < 1e-3


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_float_modes_decode_as_mlx_and_have_no_more_error(mode: str, bits: int, group_size: int) -> None:
    values = weights("normal", 64)
    values[5] = 0
    found = float_modes.quantize(columns(values, group_size), mode)
    own = float_modes.decode(found.codes, found.scales, mode).T.reshape(values.shape)
    from exo_kimi.checkpoint.packing import pack_bits

    words = pack_bits(np.ascontiguousarray(found.codes.T).reshape(values.shape), bits)
    scales = found.scales.reshape(len(values), -1)
    options = {"group_size": group_size, "bits": bits, "mode": mode}
    theirs = mx.dequantize(mx.array(words), mx.array(scales), dtype=mx.float32, **options)
    assert (np.array(theirs) == own).all()
    quantized = mx.quantize(mx.array(values), **options)
    reference = np.array(mx.dequantize(*quantized, dtype=mx.float32, **options))
    assert np.linalg.norm(own - values) <= np.linalg.norm(reference - values) * 1.0001
