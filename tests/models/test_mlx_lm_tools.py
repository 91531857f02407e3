"""mlx-lm's own tools on our model: LoRA and DoRA trained, never left out and put into the weights; prompt caches; batches.

What they do with the model of mlx-lm itself is the oracle.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import deepseek_v3
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_batch import BatchLatents8
from exo_kimi.runtime.loading.loader import load


@pytest.fixture
def model(raw_config: dict[str, Any]) -> Model:
    """Four layers with seeded float32 weights, whose latents go into 8 bits."""
    mx.random.seed(0)
    built = Model(KimiConfig.from_dict({**raw_config, "qk_rope_head_dim": 32}))
    built.eval()
    mx.eval(built.parameters())
    return built


ATTENTION = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
EXPERTS = tuple(f"mlp.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
SHARED = tuple(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
KV_B = ("self_attn.kv_b_proj",)


def adapt(model: Any, keys: tuple[str, ...], *, dora: bool = False, seed: int = 1) -> Any:
    """Adapters that change something, the same for the same names whatever the model."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": set(keys)}, dora)
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith(("lora_a", "lora_b")):
            rng = np.random.default_rng([seed, *name.encode()])
            made = mx.array(rng.normal(0, 0.2, value.shape).astype(np.float32))
            model.update(tree_unflatten([(name, made)]))
    model.eval()
    return model


def answers(model: Model, tokens: mx.array) -> list[np.ndarray]:
    """Logits of a call, of a prefill and of the decode steps after it."""
    whole = model(tokens[None])[0]
    caches = model.make_cache()
    first = model.logits(model.forward_ragged(tokens[:40], [(40, caches)]))
    steps = [model.logits(model.forward_ragged(tokens[n : n + 1], [(1, caches)])) for n in range(40, 44)]
    return [np.array(each, dtype=np.float32) for each in (whole[:44], mx.concatenate([first, *steps]))]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("keys", [ATTENTION, SHARED, KV_B, EXPERTS], ids=["attention", "shared", "kv_b", "experts"])
def test_adapters_count_in_every_way_through_the_model(
    model: Model, tokens: mx.array, keys: tuple[str, ...], dora: bool
) -> None:
    if dora and keys is EXPERTS:
        pytest.skip("mlx-lm has no DoRA of experts, and says so")
    plain = answers(model, tokens)
    fast = copy.deepcopy(model)
    fast.fuse_projections()
    adapted = answers(adapt(model, keys, dora=dora), tokens)
    assert np.abs(adapted[0] - plain[0]).max() > 0.05 * plain[0].std()
    for made in (adapted, answers(adapt(fast, keys, dora=dora), tokens)):
        for each in made:
            assert np.abs(each - adapted[0]).max() < 5e-5 * adapted[0].std()


def test_an_adapter_put_into_the_weights_gives_the_same(model: Model, tokens: mx.array) -> None:
    adapted = adapt(model, ATTENTION + SHARED + KV_B + EXPERTS)
    expected = answers(adapted, tokens)[0]
    fused = [(name, each.fuse()) for name, each in adapted.named_modules() if hasattr(each, "fuse")]
    assert len(fused) > 20 and all(name for name, _ in fused), "the model itself has mlx-lm's `fuse`"
    adapted.update_modules(tree_unflatten(fused))
    adapted.fuse_projections()
    for each in answers(adapted, tokens):
        assert np.abs(each - expected).max() < 5e-5 * expected.std()


def test_experts_on_disk_refuse_adapters_by_name(model: Model) -> None:
    layer = adapt(model, EXPERTS).layers[1].mlp.switch_mlp
    layer.bank = object()
    with pytest.raises(UsageError, match="experts that stay on disk take no adapters"):
        layer(mx.zeros((1, 64)), mx.zeros((1, 2), mx.uint32))


@pytest.fixture(scope="module")
def plain_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora") / "kimi"
    return make_tiny(
        directory, layout="bf16", dtype="F32", config={"num_hidden_layers": 3, "rope_scaling": None}, shards=1
    )


def losses(model: Any, keys: tuple[str, ...], batch: mx.array, *, steps: int = 6) -> list[float]:
    """Of steps as mlx-lm's trainer takes them."""
    adapt(model, keys)
    model.train()
    lengths = mx.array([[0, batch.shape[1]]] * batch.shape[0])
    step = nn.value_and_grad(model, default_loss)
    optimizer = optim.SGD(learning_rate=3e-3)
    seen = []
    for _ in range(steps):
        (loss, _), gradient = step(model, batch, lengths)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, loss)
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize(("length", "steps"), [(48, 6), (300, 2)])
def test_training_takes_the_course_that_it_takes_with_mlx_lm_s_model(
    plain_directory: Path, length: int, steps: int
) -> None:
    keys = ATTENTION + SHARED + EXPERTS
    batch = mx.array(np.random.default_rng(0).integers(0, 700, (2 if length < 100 else 1, length)).astype(np.int32))
    theirs, _ = load_model(plain_directory, get_model_classes=lambda config: (deepseek_v3.Model, deepseek_v3.ModelArgs))
    expected = losses(theirs, keys, batch, steps=steps)
    found = losses(load(plain_directory, dtype="float32"), keys, batch, steps=steps)
    assert expected[-1] < expected[0] - 0.001
    assert found == pytest.approx(expected, rel=2e-4)


def test_lora_of_kv_b_learns(plain_directory: Path) -> None:
    batch = mx.array(np.random.default_rng(0).integers(0, 700, (2, 24)).astype(np.int32))
    seen = losses(load(plain_directory, dtype="float32"), KV_B, batch)
    assert seen[-1] < seen[0] - 0.01


def test_full_fine_tuning_reaches_every_weight_but_the_biases_of_the_router(model: Model, tokens: mx.array) -> None:
    model.train()
    _, gradient = nn.value_and_grad(model, lambda each, x: each(x).square().mean())(model, tokens[None])
    for name, value in tree_flatten(gradient):
        assert (mx.abs(value).max().item() > 0) == (not name.endswith("e_score_correction_bias")), name


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fused"])
def test_a_model_is_cast_copied_and_pickled_whole(model: Model, tokens: mx.array, fast: bool) -> None:
    if fast:
        model.fuse_projections()
    expected = answers(model, tokens)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one, other in zip(answers(again, tokens), expected, strict=True):
            assert np.abs(one - other).max() < 5e-5 * other.std()
    model.layers[1].mlp.gate.e_score_correction_bias = mx.array(np.linspace(0, 1e-3, 8).astype(np.float32))
    before = np.array(model.layers[1].mlp.gate.e_score_correction_bias)
    model.set_dtype(mx.bfloat16)
    gate = model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == mx.float32 and np.array_equal(gate.e_score_correction_bias, before)
    assert model.layers[1].self_attn.o_proj.weight.dtype == mx.bfloat16
    assert model(tokens[None]).dtype == mx.bfloat16
    assert np.isfinite(np.array(model.forward_ragged(tokens[:1], [(1, model.make_cache())]).astype(mx.float32))).all()


def generated(model: Model, prompts: list[list[int]], caches: Any = None) -> list[list[int]]:
    """Eight greedy tokens of each by mlx-lm's BatchGenerator."""
    generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
    ids = generator.insert(prompts, [8] * len(prompts), **({} if caches is None else {"caches": caches}))
    made: dict[int, list[int]] = {each: [] for each in ids}
    for _ in range(200):
        responses = generator.next()
        responses = responses[1] if isinstance(responses, tuple) else responses
        for response in responses:
            made[response.uid].append(response.token)
        if all(len(tokens) >= 8 for tokens in made.values()):
            return [made[each][:8] for each in ids]
    raise AssertionError(made)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_batch_says_what_each_says_alone(model: Model, tokens: mx.array, kv_bits: int | None) -> None:
    model.set_kv_bits(kv_bits)
    prompts = [tokens[start:stop].tolist() for start, stop in ((0, 30), (10, 17), (20, 60))]
    alone = [generated(model, [prompt])[0] for prompt in prompts]
    assert generated(model, prompts) == alone


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_prompt_cache_is_saved_loaded_trimmed_and_batched(
    model: Model, tokens: mx.array, kv_bits: int | None, tmp_path: Path
) -> None:
    model.set_kv_bits(kv_bits)
    cache = make_prompt_cache(model)
    model(tokens[None, :40], cache)
    file = str(tmp_path / "prompt.safetensors")
    save_prompt_cache(file, cache, {"of": "a test"})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata == {"of": "a test"} and [type(each) for each in loaded] == [type(each) for each in cache]
    expected = np.array(model(tokens[None, 40:44], cache))
    assert np.array_equal(model(tokens[None, 40:44], loaded), expected)
    assert trim_prompt_cache(loaded, 4) == 4
    prompts = [tokens[40:44].tolist(), tokens[40:50].tolist()]
    alone = [generated(model, [prompt], [copy.deepcopy(loaded)])[0] for prompt in prompts]
    assert generated(model, prompts, [copy.deepcopy(loaded), copy.deepcopy(loaded)]) == alone


def test_a_batch_of_8_bits_holds_8_bits_and_gives_each_sequence_back(model: Model, tokens: mx.array) -> None:
    model.set_kv_bits(8)
    caches = [model.make_cache() for _ in range(2)]
    for count, cache in zip((30, 12), caches, strict=True):
        model(tokens[None, :count], cache)
    batch = BatchLatents8.of([cache[0] for cache in caches])
    assert batch.keys.dtype == mx.uint8 and batch.keys.shape[-1] < 2 * 64
    for index, count in enumerate((30, 12)):
        one = batch.extract(index)
        assert one.offset == count
        for got, want in zip(tree_flatten(one.state), tree_flatten(caches[index][0].state), strict=True):
            assert np.array_equal(got[1], want[1])
    empty = BatchLatents8.of([model.make_cache()[0]])
    empty.extend(batch)
    assert empty.extract(2).offset == 12 and tree_map(lambda each: each.shape, empty.extract(1).state[0])[0][2] == 30


def test_mlx_lm_s_commands_run_on_a_directory_of_ours(plain_directory: Path, tmp_path: Path) -> None:
    """`mlx_lm lora`, then `mlx_lm fuse`, with our model as the directory's own; our loader takes what comes out."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path / "kimi"
    directory.mkdir()
    for path in plain_directory.iterdir():
        if path.suffix in (".json", ".safetensors") and "tokenizer" not in path.name:
            (directory / path.name).symlink_to(path)
    config = json.loads((plain_directory / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "model_file": "ours.py"}))
    (directory / "ours.py").write_text("from exo_kimi.models.kimi_k2 import Model, ModelArgs\n")
    letters = {chr(33 + number): number for number in range(90)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="!"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.save(str(directory / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "~", "unk_token": "!"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": "abcdefgh" * 4}) + "\n" for _ in range(4)))
    trusted = ["--trust-remote-code"] if "trust-remote-code" in command("lora", "--help") else []
    adapters = str(tmp_path / "adapters")
    options = ["--iters", "6", "--batch-size", "1", "--num-layers", "3", "--steps-per-report", "1"]
    command(
        "lora",
        "--model",
        str(directory),
        "--train",
        "--data",
        str(data),
        "--adapter-path",
        adapters,
        *options,
        *trusted,
    )
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()
    trusted = ["--trust-remote-code"] if "trust-remote-code" in command("fuse", "--help") else []
    fused = tmp_path / "fused"
    command("fuse", "--model", str(directory), "--adapter-path", adapters, "--save-path", str(fused), *trusted)
    tokens = mx.array(np.arange(20, dtype=np.int32))
    expected = load(plain_directory, dtype="float32")
    with_adapter = np.array(adapted_from(expected, Path(adapters))(tokens[None]))
    found = np.array(load(fused, dtype="float32")(tokens[None]))
    assert np.abs(found - with_adapter).max() < 5e-5 * with_adapter.std()


def adapted_from(model: Model, adapters: Path) -> Any:
    """The model with adapters as mlx-lm loads them."""
    from mlx_lm.tuner.utils import load_adapters

    adapted = load_adapters(model, str(adapters))
    adapted.eval()
    return adapted


def command(*words: str) -> str:
    """What `python -m mlx_lm` prints, both streams; it must succeed."""
    done = subprocess.run([sys.executable, "-m", "mlx_lm", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout + done.stderr
