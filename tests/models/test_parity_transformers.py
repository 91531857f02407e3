"""The model against transformers' DeepseekV3ForCausalLM, both in float32 on the same bf16 checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

torch = pytest.importorskip("torch", reason="the oracle runs on torch")
transformers = pytest.importorskip("transformers")

YARN = {
    "type": "yarn",
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_slow": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "yarn 32, beta 1 (K2-Instruct)": {"rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0}},
    "yarn 64, beta 1 (K2-Thinking)": {"rope_scaling": {**YARN, "factor": 64.0, "beta_fast": 1.0}},
    "yarn 64, beta 32 (K2.5)": {"rope_scaling": {**YARN, "factor": 64.0, "beta_fast": 32.0}},
    "no yarn": {"rope_scaling": None},
    "no q_lora": {"q_lora_rank": None},
    "2 of 4 groups": {"n_group": 4, "topk_group": 2},
    "2 of 4 groups, bias, 2 shared experts, eps 1e-5": {
        "n_group": 4,
        "topk_group": 2,
        "attention_bias": True,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": False,
    },
    "mscales that differ": {"rope_scaling": {**YARN, "factor": 40.0, "beta_fast": 32.0, "mscale": 0.7}},
}
SMALL = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64}
PROMPT_LENGTHS = (1, 2, 31, 128, 300)
BAR = 1e-3


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Any]]:
    """Our model and theirs."""
    config = {**SMALL, **CONFIGS[request.param]}
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), layout="bf16", seed=3, config=config)
    yield load(directory, dtype="float32"), load_theirs(directory)


def load_theirs(directory: Path) -> Any:
    raw = json.loads((directory / "config.json").read_text())
    ours_only = ("architectures", "model_type", "torch_dtype", "transformers_version")
    config = transformers.DeepseekV3Config(**{key: value for key, value in raw.items() if key not in ours_only})
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def prompt(length: int, vocab_size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(length).integers(0, vocab_size, length)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_logits_are_those_of_transformers(pair: tuple[Model, Any], length: int) -> None:
    ours, theirs = pair
    ids = prompt(length, ours.args.vocab_size)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)[None]).logits[0].numpy()
    found = np.array(ours(mx.array(ids)[None])[0])
    assert np.abs(found - expected).max() <= BAR * expected.std()


def test_32_greedy_tokens_are_those_of_transformers(pair: tuple[Model, Any]) -> None:
    ours, theirs = pair
    ids = prompt(40, ours.args.vocab_size)
    theirs_ids, past, step = [], None, torch.tensor(ids)[None]
    caches, ours_ids, chunk = ours.make_cache(), [], mx.array(ids)
    for _ in range(32):
        with torch.no_grad():
            output = theirs(step, past_key_values=past, use_cache=True)
        past, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        theirs_ids.append(int(step))
        logits = ours.logits(ours.forward_ragged(chunk, [(len(chunk), caches)])[-1:])
        chunk = mx.argmax(logits, axis=-1)
        ours_ids.append(int(chunk.item()))
    assert ours_ids == theirs_ids
