"""Calibration: every measure against a loop over tokens, the pass against the whole model, and what it holds in memory."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli import main
from exo_kimi.compress.calibrate.calibrate import Calibration, calibrate
from exo_kimi.compress.calibrate.file import measured_to_json, read_measured
from exo_kimi.compress.calibrate.measures import LayerMeasures, Measured, weight_norms
from exo_kimi.compress.calibrate.routing import route, weighted_sum
from exo_kimi.compress.calibrate.scores import CRITERIA, saliency, super_experts
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.loading.loader import load
from tests.compress.conftest import SHAPE, Maker


@pytest.fixture(scope="module")
def moe(tiny: Maker) -> MoE:
    layer: MoE = load(tiny("mlx"), dtype="float32").layers[1].mlp
    return layer


def _tokens(count: int = 23) -> mx.array:
    return mx.random.normal((count, SHAPE["hidden_size"]), key=mx.random.key(5))


def _without(layer: MoE, x: mx.array, expert: int) -> mx.array:
    """The oracle: the routed experts' sum of one token, (1, D), after the router was told never to choose an expert."""
    bias = layer.gate.e_score_correction_bias
    layer.gate.e_score_correction_bias = mx.where(mx.arange(bias.size) == expert, -mx.inf, bias)
    indices, weights = layer.gate(x)
    layer.gate.e_score_correction_bias = bias
    return weighted_sum(layer.switch_mlp(x, indices), weights)


@pytest.mark.parametrize("variant", ["mlx", "groups"])
def test_leaving_an_expert_out_is_routing_without_it(variant: str, tiny: Maker) -> None:
    layer: MoE = load(tiny(variant), dtype="float32").layers[1].mlp
    x = _tokens()
    routed = route(layer, x)
    for token in range(x.shape[0]):
        for place, expert in enumerate(routed.indices[token].tolist()):
            plain = _without(layer, x[token : token + 1], int(expert))[0]
            assert mx.allclose(routed.without[token, place], plain, rtol=1e-4, atol=1e-5).item(), (token, expert)


def test_choices_and_weights_are_the_routers_own(moe: MoE) -> None:
    """Sigmoid, correction bias, normalised, scaled: what the gate returns, and not a softmax of its logits."""
    x = _tokens()
    routed = route(moe, x)
    indices, weights = moe.gate(x)
    assert mx.array_equal(routed.indices, indices).item()
    assert mx.array_equal(routed.weights, weights).item()
    assert mx.allclose(routed.weights.sum(-1), mx.array(moe.gate.factor)).item()
    softmax = mx.softmax(x @ moe.gate.weight.astype(mx.float32).T, axis=-1)
    best = mx.argpartition(softmax, kth=-moe.gate.chosen, axis=-1)[:, -moe.gate.chosen :]
    assert not mx.array_equal(mx.sort(best, axis=-1), mx.sort(indices, axis=-1)).item()


def test_every_criterion_is_its_definition(moe: MoE) -> None:
    x = _tokens()
    experts = moe.gate.weight.shape[0]
    measures = LayerMeasures.empty(experts)
    measures.weight_norm = weight_norms(moe.switch_mlp)
    routed = route(moe, x)
    measures.add_routed(routed)
    outputs, weights = np.array(routed.outputs), np.array(routed.weights)
    together, without = np.array(routed.together), np.array(routed.without)
    mine: dict[str, list[list[float]]] = {name: [[] for _ in range(experts)] for name in CRITERIA}
    for token, chosen in enumerate(np.array(routed.indices)):
        for place, expert in enumerate(chosen):
            norm = float(np.linalg.norm(outputs[token, place]))
            weight = float(weights[token, place])
            loss = float(np.square(together[token] - without[token, place]).sum())
            for name, value in (
                ("leave-one-out", loss / np.square(together).sum()),
                ("reap", weight * norm),
                ("mean-gate", weight),
                ("man", norm),
                ("msan", norm**2),
                ("ean", norm),
                ("frequency", 1.0),
            ):
                mine[name][expert].append(value)
    for name in ("reap", "mean-gate", "man", "msan"):
        expected = [np.mean(values) if values else 0.0 for values in mine[name]]
        np.testing.assert_allclose(saliency(measures, name), expected, rtol=1e-5)  # type: ignore[arg-type]
    for name in ("leave-one-out", "ean", "frequency"):
        expected = [float(np.sum(values)) for values in mine[name]]
        np.testing.assert_allclose(saliency(measures, name), expected, rtol=1e-4)  # type: ignore[arg-type]
    assert not np.array_equal(saliency(measures, "random", seed=1), saliency(measures, "random", seed=2))


def test_weight_norms_are_of_what_is_multiplied_with(tiny: Maker) -> None:
    packed = weight_norms(load(tiny("int4"), dtype="float32").layers[1].mlp.switch_mlp)
    plain = weight_norms(load(tiny("bf16"), dtype="float32").layers[1].mlp.switch_mlp)
    np.testing.assert_allclose(packed, plain, rtol=0.05)
    assert len(set(plain.tolist())) == len(plain)


def test_a_pass_is_the_whole_models(tiny: Maker, texts: list[Encoded]) -> None:
    """What experts are measured on is what they see when the model runs: the loads are those of a forward pass."""
    directory = tiny("int4")
    measured = calibrate(Calibration(walk=LayerWalk(checkpoint=Checkpoint(directory), dtype="float32"), texts=texts))
    model = load(directory, dtype="float32")
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.uint32]]] = []

    class Watching:
        def __init__(self, router: object) -> None:
            self.router = router

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            indices, weights = self.router(x)  # type: ignore[operator]
            seen.append(np.array(indices))
            return indices, weights

    last = model.layers[-1].mlp
    last.gate = Watching(last.gate)
    for text in texts:
        model(mx.array(text.ids)[None])
    loads = np.bincount(np.concatenate([each.reshape(-1) for each in seen]), minlength=16)
    np.testing.assert_array_equal(measured.layers[-1].tokens, loads)
    assert measured.tokens == sum(len(text.ids) for text in texts)
    assert measured.layers[0].experts == 0
    assert all(0 < layer.block_influence < 2 for layer in measured.layers)


def test_a_stopped_pass_goes_on_and_gives_the_same(tiny: Maker, texts: list[Encoded], tmp_path: Path) -> None:
    walk = LayerWalk(checkpoint=Checkpoint(tiny("int4")), dtype="float32")
    whole = calibrate(Calibration(walk=walk, texts=texts))
    kept = tmp_path / "scores.json.part"

    def stop(line: str) -> None:
        if line.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(Calibration(walk=walk, texts=texts, kept=kept), say=stop)
    lines: list[str] = []
    again = calibrate(Calibration(walk=walk, texts=texts, kept=kept), say=lines.append)
    assert lines[0] == "going on after layer 2"
    assert measured_to_json(again) == measured_to_json(whole)
    assert not kept.exists()
    with pytest.raises(KeyboardInterrupt):
        calibrate(Calibration(walk=walk, texts=texts, kept=kept), say=stop)
    with pytest.raises(UsageError, match="something else is in the way"):
        calibrate(Calibration(walk=walk, texts=texts[:2], kept=kept))


def test_one_layer_is_in_memory_whatever_the_number_of_layers(texts: list[Encoded], tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 9):
        directory = make_tiny(tmp_path / str(layers), layout="bf16", config={"num_hidden_layers": layers})
        walk = LayerWalk(checkpoint=Checkpoint(directory))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        calibrate(Calibration(walk=walk, texts=texts))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < walk.checkpoint.manifest().resident_bytes / 2


def test_super_experts_are_the_outliers_of_the_first_layers() -> None:
    def layer(peaks: list[float]) -> LayerMeasures:
        made = LayerMeasures.empty(len(peaks))
        made.peak = np.array(peaks)
        return made

    quiet = [1.0] * 8
    measured = Measured(
        fingerprint="",
        chosen=2,
        layers=(layer([]), layer([1.0] * 7 + [900.0]), *[layer(quiet)] * 25, layer([1.0] * 7 + [1000.0])),
        tokens=1,
        texts=1,
        domain="",
    )
    assert super_experts(measured) == {1: (7,)}


def test_the_command_writes_scores_that_are_read_again(tiny: Maker, tmp_path: Path) -> None:
    lines = [
        {"text": "The tram leaves at nine.", "domain": "prose"},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"ids": [5, 6, 7]},
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    prose = tmp_path / "prose.txt"
    prose.write_text("Rain fell on the harbour all night.", encoding="utf-8")
    out = tmp_path / "scores.json"
    words = ["calibrate", str(tiny("mlx")), "--text", str(file), "--text", str(prose), "-o", str(out)]
    assert main([*words, "--dtype", "float32", "--domain", "small talk"]) == 0
    measured = read_measured(out)
    assert (measured.texts, measured.domain, measured.files) == (4, "small talk", ("mixed.jsonl", "prose.txt"))
    assert measured.layers[1].seen == measured.tokens


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1"),
        ('{"ids": [99999]}', "vocabulary"),
        ("[1]", "list"),
    ],
)
def test_a_line_that_is_no_text_is_named(content: str, found: str, tiny: Maker, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content, encoding="utf-8")
    from exo_kimi.compress.texts.encoding import Encoder
    from exo_kimi.compress.texts.reading import read_texts

    with pytest.raises(UsageError) as error:
        read_texts([file], Encoder.from_directory(tiny("mlx")))
    assert found in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"version": 2}'])
def test_a_file_that_holds_no_scores_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="not a file of scores"):
        read_measured(file)
