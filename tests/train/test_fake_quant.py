"""INT4 as the aware training rounds it: exported weights are a fixed point, and their files say the same codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exo_kimi.checkpoint.packing import int4_codes, quantize_int4, restore, unpack_bits
from exo_kimi.train.export import read_parameters, requantize, write_checkpoint
from exo_kimi.train.model.parameters import fake_quant, first_values, is_expert
from tests.train.conftest import RECIPE

VALUES = st.floats(-4, 4, width=32, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-20)


@settings(max_examples=60)
@given(arrays(np.float32, (2, 64), elements=VALUES))
def test_rounding_what_was_rounded_changes_no_code(weight: np.ndarray) -> None:
    codes, scales = int4_codes(weight, dtype="BF16", symmetric=True)
    again, same = int4_codes(fake_quant(weight), dtype="BF16", symmetric=True)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(restore(same), restore(scales))


@settings(max_examples=30)
@given(arrays(np.float32, (2, 64), elements=VALUES))
def test_packed_codes_are_the_codes_plus_eight(weight: np.ndarray) -> None:
    codes, _ = int4_codes(weight, dtype="BF16", symmetric=True)
    packed, _ = quantize_int4(weight, dtype="BF16", symmetric=True)
    np.testing.assert_array_equal(unpack_bits(packed.view(np.uint32), 4).astype(int) - 8, codes)
    assert np.abs(codes).max() <= 7


def test_an_exported_checkpoint_loads_as_what_training_computed_with(vocabulary: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    parameters = {
        name: value + rng.standard_normal(value.shape).astype(np.float32)
        for name, value in first_values(RECIPE.config, 0).items()
    }
    write_checkpoint(tmp_path / "int4", vocabulary, parameters, layout="int4")
    read = read_parameters(tmp_path / "int4")
    assert set(read) == set(parameters)
    for name, value in parameters.items():
        if is_expert(name):
            np.testing.assert_array_equal(read[name], fake_quant(value))
        else:
            np.testing.assert_allclose(read[name], value, rtol=2**-8)
    requantize(tmp_path / "int4", tmp_path / "mixed", recipe="mixed346")
    mixed = read_parameters(tmp_path / "mixed")
    assert all(np.isfinite(value).all() for value in mixed.values())
    name = "model.layers.1.mlp.switch_mlp.gate_proj.weight"
    assert 0 < np.abs(mixed[name] - read[name]).max() < 1
