"""Mean squares of inputs: against a plain forward pass of the whole model, expert by expert, and into `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.cli import main
from exo_kimi.compress.calibrate.inputs import measure_inputs
from exo_kimi.compress.convert.importance import read_importance, read_worth
from exo_kimi.compress.convert.measure import measure
from exo_kimi.compress.layers import LayerWalk, attend, groups_of
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError
from exo_kimi.runtime.loading.loader import load
from tests.compress.conftest import Maker

LENGTHS = (70, 5, 41)


def _texts() -> list[Encoded]:
    chance = np.random.default_rng(2)
    ids = [chance.integers(0, 500, length).astype(np.int32) for length in LENGTHS]
    return [Encoded(ids=each, counted=np.ones(len(each), bool)) for each in ids]


def _oracle(directory: Path, texts: list[Encoded]) -> dict[str, np.ndarray]:
    """The whole model on each text by itself, by MLX's own primitives, token by token through its experts."""
    model = load(directory, dtype="float32")
    rows: dict[str, list[Any]] = {}

    def see(path: str, x: mx.array) -> None:
        rows.setdefault(path, []).append(np.array(x, np.float32).reshape(-1, x.shape[-1]))

    for text in texts:
        x = model.embed(mx.array(text.ids))
        positions = mx.arange(len(text.ids))
        for number, layer in enumerate(model.layers):
            path, attention, h = f"model.layers.{number}", layer.self_attn, layer.input_layernorm(x)
            see(f"{path}.self_attn.q_a_proj", h)
            see(f"{path}.self_attn.kv_a_proj_with_mqa", h)
            see(f"{path}.self_attn.q_b_proj", attention.q_a_layernorm(attention.q_a_proj(h)))
            q_nope, q_pe, latent, k_pe = attention.project(h, positions)
            see(f"{path}.self_attn.kv_b_proj", latent)
            k_nope, values = attention.expand(latent[None, None], slice(0, attention.heads))
            keys = mx.concatenate([k_nope[0], mx.repeat(k_pe[None], attention.heads, axis=0)], axis=-1)
            queries = mx.concatenate([q_nope, q_pe], axis=-1).swapaxes(0, 1)
            scores = queries @ keys.swapaxes(-1, -2) * attention.scale
            scores = mx.where(mx.tri(len(text.ids)).astype(mx.bool_), scores, -mx.inf)
            mixed = (mx.softmax(scores, axis=-1) @ values[0]).swapaxes(0, 1).reshape(len(text.ids), -1)
            see(f"{path}.self_attn.o_proj", mixed)
            x = x + attention.o_proj(mixed)
            h = layer.post_attention_layernorm(x)
            if "switch_mlp" not in layer.mlp:
                see(f"{path}.mlp.gate_proj", h)
                see(f"{path}.mlp.down_proj", _swiglu(layer.mlp.gate_proj(h), layer.mlp.up_proj(h)))
            else:
                shared, switch = layer.mlp.shared_experts, layer.mlp.switch_mlp
                see(f"{path}.mlp.shared_experts.up_proj", h)
                see(f"{path}.mlp.shared_experts.down_proj", _swiglu(shared.gate_proj(h), shared.up_proj(h)))
                for token, experts in enumerate(np.array(layer.mlp.gate(h)[0])):
                    for expert in experts:
                        one, where = h[token : token + 1], mx.array([[int(expert)]])
                        see(f"{path}.mlp.switch_mlp.gate_proj {expert}", one)
                        inner = _swiglu(switch.gate_proj(one, where), switch.up_proj(one, where))
                        see(f"{path}.mlp.switch_mlp.down_proj {expert}", inner)
            x = x + layer.mlp(h)
        see("lm_head", model.model.norm(x))
    return {path: np.square(np.concatenate(each)).mean(0) for path, each in rows.items()}


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@pytest.mark.parametrize("layout", ["mlx", "int4"])
def test_the_pass_sees_what_a_plain_forward_pass_sees(layout: str, tiny: Maker) -> None:
    directory = tiny(layout)
    found = measure_inputs(LayerWalk(checkpoint=Checkpoint(directory), dtype="float32"), _texts()).columns
    wanted = _oracle(directory, _texts())
    experts_seen = 0
    for key, values in wanted.items():
        path, _, expert = key.partition(" ")
        ours = found[path][int(expert)] if expert else found[path]
        experts_seen += bool(expert)
        np.testing.assert_allclose(ours, values, rtol=2e-3, atol=1e-6, err_msg=key)
    assert experts_seen > 4
    quantizable = {s.spec.path for s in Checkpoint(directory).manifest().sources if s.spec.quantizable}
    assert set(found) == quantizable - {"model.embed_tokens"}


def test_an_expert_that_no_token_chose_has_the_mean_of_all(tiny: Maker) -> None:
    one = [Encoded(ids=np.array([7, 8], np.int32), counted=np.ones(2, bool))]
    found = measure_inputs(LayerWalk(checkpoint=Checkpoint(tiny("mlx")), dtype="float32"), one).columns
    experts = next(values for path, values in found.items() if path.endswith("switch_mlp.up_proj"))
    assert experts.shape[0] == Checkpoint(tiny("mlx")).config.n_routed_experts
    assert experts.any(-1).all() and np.isfinite(experts).all()


@pytest.mark.parametrize("layout", ["mlx", "absorbed"])
def test_worth_is_what_an_error_of_a_module_makes_of_the_final_states(layout: str, tiny: Maker) -> None:
    """In the last layer by definition: of o_proj and of the MLP's last product at least their share of the final states."""
    directory = tiny(layout)
    checkpoint = Checkpoint(directory)
    found = measure_inputs(LayerWalk(checkpoint=checkpoint, dtype="float32"), _texts()[:1]).worth
    assert set(found) == {s.spec.path for s in checkpoint.manifest().sources if s.spec.quantizable}
    assert found["lm_head"] == 1 and all(value > 0 for value in found.values())
    model, text, last = load(directory, dtype="float32"), _texts()[0], checkpoint.config.num_hidden_layers - 1
    group = groups_of([text])[0]
    x = model.embed(group.ids)
    for layer in model.layers[:-1]:
        h = attend(layer, x, group)
        x = h + layer.mlp(layer.post_attention_layernorm(h))
    h = attend(model.layers[-1], x, group)
    shared = model.layers[-1].mlp.shared_experts(model.layers[-1].post_attention_layernorm(h))
    final = h + model.layers[-1].mlp(model.layers[-1].post_attention_layernorm(h))
    share = float((mx.square(shared).sum() / mx.square(final).sum()).item())
    assert found[f"model.layers.{last}.mlp.shared_experts.down_proj"] == pytest.approx(share, rel=1e-2)


def test_the_file_is_what_convert_reads(tiny: Maker, tmp_path: Path) -> None:
    directory, texts, output = tiny("mlx"), tmp_path / "t.jsonl", tmp_path / "inputs.safetensors"
    texts.write_text("\n".join(json.dumps({"ids": text.ids.tolist()}) for text in _texts()))
    main(["calibrate", str(directory), "--text", str(texts), "--inputs", str(output), "--dtype", "float32"])
    checkpoint = Checkpoint(directory)
    importance, worths = read_importance(output, checkpoint), read_worth(output)
    plain = {each.path: each for each in measure(checkpoint)}
    weighed = {each.path: each for each in measure(checkpoint, importance=importance)}
    path = "model.layers.0.self_attn.o_proj"
    assert weighed[path].options != plain[path].options
    assert {each.path: each.worth for each in measure(checkpoint, worths=worths)} == worths


def test_no_text_and_no_output_are_said(tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no text"):
        measure_inputs(LayerWalk(checkpoint=Checkpoint(tiny("mlx"))), [])
    assert main(["calibrate", str(tiny("mlx")), "--text", str(tmp_path / "x")]) != 0
    assert "--inputs FILE" in capsys.readouterr().err
