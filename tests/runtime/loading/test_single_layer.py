"""One layer, loaded and run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import NotACheckpointError, SplitError
from exo_kimi.runtime.loading.single_layer import run_layer
from exo_kimi.runtime.loading.single_tower import run_tower


@pytest.mark.parametrize("options", [{}, {"absorbed": True}, {"layout": "int4"}, {"layout": "fp8"}], ids=str)
@pytest.mark.parametrize("layer", [0, 1, 6])
def test_a_layer_runs_alone_and_is_accounted_for(tmp_path: Path, options: dict[str, Any], layer: int) -> None:
    make_tiny(tmp_path, **options)
    report = run_layer(tmp_path, layer, tokens=32, decode_steps=3, dtype="float32")
    sources = [source for source in resolve(open_index(tmp_path)).sources if source.spec.layer == layer]
    assert report.mixture_of_experts == (layer > 0)
    assert report.input_shape == report.output_shape == (32, 256)
    assert report.output_is_finite
    assert [line.path for line in report.modules] == [source.spec.path for source in sources]
    assert report.disk_bytes == sum(source.disk_bytes for source in sources)
    assert report.peak_bytes >= report.resident_bytes > 0
    assert 0 < report.decode_bytes <= sum(source.resident_bytes for source in sources)
    assert min(report.load_s, report.prefill_s, report.prefill_first_s, report.decode_s, report.decode_first_s) > 0


def test_what_others_left_behind_is_not_taken_off(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    circle: list[Any] = [mx.zeros((1 << 26,), mx.uint8)]
    mx.eval(circle)
    circle.append(circle)
    del circle
    assert run_layer(tmp_path, 6, tokens=4, decode_steps=2, dtype="float32").resident_bytes > 0


def test_the_report_shows_shapes_bits_time_and_memory(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    text = run_layer(tmp_path, 3, tokens=5, decode_steps=2, dtype="float32").to_text()
    assert text.startswith("layer 3 (mixture of experts), float32 activations, on ")
    for words in (
        "mlp.switch_mlp.gate_proj      3-bit g64    16 x 128 x 256",
        "mlp.switch_mlp.down_proj      4-bit g64    16 x 256 x 128",
        "self_attn.o_proj              6-bit g64    256 x 256",
        "prefill  5 x 256 -> 5 x 256 in",
        "GB/s",
        "at peak",
        "output   finite",
    ):
        assert words in text


def test_a_layer_outside_the_model_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with pytest.raises(SplitError):
        run_layer(tmp_path, 7)


def test_the_tower_runs_alone_and_is_accounted_for(tmp_path: Path) -> None:
    make_tiny(tmp_path, vision=True)
    report = run_tower(tmp_path, dtype="float32")
    assert (report.tensors, report.blocks) == (35, 2)
    assert report.output_shape == ((640 + 27) // 28 * ((480 + 27) // 28), 256)
    assert report.output_is_finite
    assert report.peak_bytes >= report.resident_bytes > 0
    assert "640 x 480 pixels -> 36 x 46 patches -> 414 tokens of 256" in report.to_text()


def test_a_checkpoint_without_a_tower_says_why(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with pytest.raises(NotACheckpointError, match="describes no vision tower"):
        run_tower(tmp_path)
