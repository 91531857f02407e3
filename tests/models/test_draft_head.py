"""The draft head against its oracle in NumPy, for both kinds of attention, both versions and every published spelling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.draft_modules import DraftParts
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.draft import SPELLINGS, draft_raw_config, make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import MissingTensorError
from exo_kimi.models.draft_head import DraftHead
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load
from tests.models.draft_oracle import DraftOracle, Floats

TOLERANCE = 1e-5
CASES = list(itertools.product(("mha", "mla"), ("3", "3.1")))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_tiny(tmp_path_factory.mktemp("target"), layout="bf16", dtype="F32"))


def inputs(target: Checkpoint, count: int, seed: int = 0) -> tuple[list[int], Floats]:
    rng = np.random.default_rng(seed)
    config = target.config
    tokens = rng.integers(0, config.vocab_size, count).tolist()
    return tokens, rng.standard_normal((count, 3 * config.hidden_size))


def close(found: mx.array, expected: Floats) -> None:
    scale = np.abs(expected[np.isfinite(expected)]).max()
    error = np.abs(np.array(found.astype(mx.float32), np.float64) - expected)
    assert error.max() <= TOLERANCE * max(scale, 1.0)


def targets_logits(head: DraftHead, out: mx.array, vocab_size: int) -> mx.array:
    logits = head.logits(out)
    wide = mx.full((logits.shape[0], vocab_size), -float("inf"))
    ids = head.to_target_ids(mx.arange(logits.shape[1]))
    wide[:, ids] = logits
    return wide


def agrees(head: DraftHead, oracle: DraftOracle, target: Checkpoint) -> None:
    """A prefill of true features, two single ones, and two steps of the head on its own output."""
    tokens, features = inputs(target, 9)
    caches = head.make_cache()
    fused = head.fuse(mx.array(features.astype(np.float32)))
    expected = [oracle.fuse(row) for row in features]
    close(fused, np.array(expected))
    outs = head(mx.array(tokens[:6]), fused[:6], [(6, caches)])
    for i in range(6, 9):
        outs = mx.concatenate([outs, head(mx.array(tokens[i : i + 1]), fused[i : i + 1], [(1, caches)])])
    vocab = target.config.vocab_size
    hidden = expected[0]
    for i, token in enumerate(tokens):
        logits, hidden = oracle.step(token, expected[i])
        found = np.array(targets_logits(head, outs[i : i + 1], vocab), np.float64)[0]
        assert np.array_equal(np.isfinite(found), np.isfinite(logits))
        drafted = np.isfinite(logits)
        close(mx.array(found[drafted].astype(np.float32)), logits[drafted])
        close(head.next_hidden(outs[i : i + 1])[0], hidden)
    out = outs[-1:]
    for _ in range(2):
        token = int(head.to_target_ids(mx.argmax(head.logits(out), axis=-1)).item())
        assert token == int(logits.argmax())
        out = head(mx.array([token]), head.next_hidden(out), [(1, caches)])
        logits, hidden = oracle.step(token, hidden)
        close(head.next_hidden(out)[0], hidden)


@pytest.mark.parametrize(("kind", "version"), CASES)
@pytest.mark.parametrize("draft_vocab_size", [None, 100])
def test_a_head_agrees_with_the_oracle(
    tmp_path: Path, target: Checkpoint, kind: Any, version: Any, draft_vocab_size: int | None
) -> None:
    make_tiny_draft(tmp_path, target.config, kind=kind, version=version, draft_vocab_size=draft_vocab_size, dtype="F32")
    agrees(load_draft_head(tmp_path, target), DraftOracle(tmp_path), target)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_every_spelling_is_the_same_head(tmp_path: Path, target: Checkpoint, spelling: Any, kind: Any) -> None:
    make_tiny_draft(tmp_path, target.config, kind=kind, spelling=spelling, dtype="F32", draft_vocab_size=64)
    agrees(load_draft_head(tmp_path, target), DraftOracle(tmp_path), target)


@pytest.mark.parametrize("more", [{"norm_before_residual": True}, {"use_aux_norm": True, "norm_output": True}])
def test_other_spellings_of_the_norms(tmp_path: Path, target: Checkpoint, more: dict[str, Any]) -> None:
    make_tiny_draft(tmp_path, target.config, kind="mha", dtype="F32", config=more)
    agrees(load_draft_head(tmp_path, target), DraftOracle(tmp_path), target)


@pytest.mark.parametrize("stage", ["none", "whole", "last"])
def test_embedding_and_head_of_the_target_stand_in(tmp_path: Path, target: Checkpoint, stage: str) -> None:
    """They are the model's, where it holds them, and else read from its files."""
    make_tiny_draft(tmp_path, target.config, own_embedding=False, own_head=False, dtype="F32")
    whole = load(target.directory, dtype="float32")
    layers = target.config.num_hidden_layers
    model = {"none": None, "whole": whole, "last": load(target.directory, layers - 1, layers)}[stage]
    head = load_draft_head(tmp_path, target, model=model)
    weights = {
        "embed_tokens.weight": np.array(whole.model.embed_tokens.weight, np.float64),
        "lm_head.weight": np.array(whole.lm_head.weight, np.float64),
    }
    agrees(head, DraftOracle(tmp_path, weights), target)
    held = {name for name, _ in head.named_modules()}
    assert "embed_tokens" not in held and "lm_head" not in held


def test_sequences_of_one_pass_are_as_each_alone(tmp_path: Path, target: Checkpoint) -> None:
    for kind in ("mha", "mla"):
        directory = make_tiny_draft(tmp_path / kind, target.config, kind=kind, dtype="F32")
        head = load_draft_head(directory, target)
        lengths = (5, 1, 3)
        runs = [inputs(target, length, seed) for seed, length in enumerate(lengths)]
        fused = [head.fuse(mx.array(features.astype(np.float32))) for _, features in runs]
        alone = [
            head(mx.array(tokens), hidden, [(len(tokens), head.make_cache())])
            for (tokens, _), hidden in zip(runs, fused, strict=True)
        ]
        caches = [head.make_cache() for _ in runs]
        together = head(
            mx.array([token for tokens, _ in runs for token in tokens]),
            mx.concatenate(fused),
            list(zip(lengths, caches, strict=True)),
        )
        assert mx.allclose(together, mx.concatenate(alone), atol=TOLERANCE).item()
        assert [cache[0].offset for cache in caches] == list(lengths)


def test_a_trimmed_cache_goes_on_as_if_the_rest_had_never_been(tmp_path: Path, target: Checkpoint) -> None:
    for kind in ("mha", "mla"):
        head = load_draft_head(make_tiny_draft(tmp_path / kind, target.config, kind=kind, dtype="F32"), target)
        tokens, features = inputs(target, 8)
        fused = head.fuse(mx.array(features.astype(np.float32)))
        straight, back = head.make_cache(), head.make_cache()
        head(mx.array(tokens[:4]), fused[:4], [(4, straight)])
        head(mx.array(tokens[:4]), fused[:4], [(4, back)])
        head(mx.array([1, 2, 3]), fused[5:8], [(3, back)])
        back[0].trim(3)
        expected = head(mx.array(tokens[4:6]), fused[4:6], [(2, straight)])
        assert mx.allclose(head(mx.array(tokens[4:6]), fused[4:6], [(2, back)]), expected, atol=TOLERANCE).item()


def test_blocks_of_a_small_budget_give_the_same(tmp_path: Path, target: Checkpoint) -> None:
    for kind in ("mha", "mla"):
        head = load_draft_head(make_tiny_draft(tmp_path / kind, target.config, kind=kind, dtype="F32"), target)
        tokens, features = inputs(target, 12)
        fused = head.fuse(mx.array(features.astype(np.float32)))
        whole = head(mx.array(tokens), fused, [(12, head.make_cache())])
        head.set_scratch_bytes(1)
        assert mx.allclose(head(mx.array(tokens), fused, [(12, head.make_cache())]), whole, atol=TOLERANCE).item()


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_quantized_head_is_near_its_plain_one(tmp_path: Path, target: Checkpoint, kind: Any) -> None:
    plain = load_draft_head(make_tiny_draft(tmp_path / "a", target.config, kind=kind, dtype="F32"), target)
    packed = load_draft_head(make_tiny_draft(tmp_path / "b", target.config, kind=kind, dtype="F32", bits=8), target)
    assert "scales" in packed.fc and "scales" in packed.layers[0].mlp.up_proj
    tokens, features = inputs(target, 5)
    rows = mx.array(features.astype(np.float32))
    one, other = (
        head.logits(head(mx.array(tokens), head.fuse(rows), [(5, head.make_cache())])) for head in (plain, packed)
    )
    assert 1e-4 < (mx.abs(one - other).max() / mx.abs(one).max()).item() < 0.1


def test_features_one_layer_off_are_another_answer(tmp_path: Path, target: Checkpoint) -> None:
    """The features are in the config's order: with two of them exchanged, the head says something else."""
    head = load_draft_head(make_tiny_draft(tmp_path, target.config, dtype="F32"), target)
    _, features = inputs(target, 1)
    a, b, c = np.split(features.astype(np.float32), 3, axis=-1)
    right, wrong = (head.fuse(mx.array(np.concatenate(parts, axis=-1))) for parts in ((a, b, c), (b, a, c)))
    assert mx.abs(right - wrong).max().item() > 0.1


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_biases_are_read_where_the_config_has_them(tmp_path: Path, target: Checkpoint, kind: Any) -> None:
    directory = make_tiny_draft(tmp_path, target.config, kind=kind, dtype="F32", config={"attention_bias": True})
    head = load_draft_head(directory, target)
    attention = head.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if kind == "mha" else ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    assert all("bias" in attention[name] for name in names)
    tokens, features = inputs(target, 4)
    fused = head.fuse(mx.array(features.astype(np.float32)))
    before = head(mx.array(tokens), fused, [(4, head.make_cache())])
    attention.o_proj.bias = attention.o_proj.bias + 1.0
    assert not mx.allclose(head(mx.array(tokens), fused, [(4, head.make_cache())]), before).item()


def test_what_was_not_given_of_the_target_is_an_error_by_name(target: Checkpoint) -> None:
    config = DraftConfig.from_dict(draft_raw_config(target.config, kind="mha"))
    head = DraftHead(config, DraftParts(embeds=False, heads=False))
    with pytest.raises(MissingTensorError, match="no embed_tokens of its own"):
        head(mx.array([1]), mx.zeros((1, config.hidden_size)), [(1, head.make_cache())])
