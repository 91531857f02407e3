"""A draft head's training of seconds: the loss falls, a resumed run is the same run, the same seed gives the same file, and
acceptance counts what a plain loop with the served head counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.errors import UsageError
from exo_kimi.models.draft_head import DraftHead
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.mla import Span
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.draft import acceptance, command, trainer
from exo_kimi.train.draft.acceptance import accepted, head_parameters, read_target
from exo_kimi.train.draft.command import train_draft
from exo_kimi.train.draft.recipe import DraftRecipe
from exo_kimi.train.draft.trainer import DraftTrainer

DATA = Path(str(files("exo_kimi").joinpath("data")))
TINY, HEAD = DATA / "tiny-kimi-k2", DATA / "tiny-kimi-k2-draft"
RECIPE = DraftRecipe(steps=6, warmup_steps=2, rollout_steps=3, group_tokens=120, draft_vocab_size=256)
MOST_CHAIN = 3


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_directory(TINY)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vocabulary and an acceptance of the tests take is less."""
    monkeypatch.setattr(trainer, "_SAMPLED_TEXTS", 40)
    monkeypatch.setattr(command, "_QUESTIONS", 1)
    monkeypatch.setattr(acceptance, "MAX_TOKENS", 24)
    cases = acceptance.question_cases
    monkeypatch.setattr(acceptance, "question_cases", lambda count, seed: cases(count, seed)[:6])
    monkeypatch.setattr(acceptance, "tool_cases", lambda count, seed: [])


def made(encoder: Encoder, recipe: DraftRecipe) -> DraftTrainer:
    checkpoint = Checkpoint(TINY)
    config = DraftConfig.from_dict(recipe.raw_config(checkpoint.config, "x"))
    ids = trainer.common_tokens(encoder, config.draft_vocab_size, recipe.seed)
    return DraftTrainer(recipe, config, read_target(checkpoint, config), encoder, ids)


def test_the_loss_falls_and_a_resumed_training_is_the_training(encoder: Encoder, tmp_path: Path) -> None:
    whole, half, rest = (made(encoder, RECIPE) for _ in range(3))
    whole.run(lambda _: None)
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    half.run(lambda _: None, until=3)
    half.save(tmp_path / "state.npz")
    rest.resume(tmp_path / "state.npz")
    rest.run(lambda _: None)
    assert rest.losses == whole.losses
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(rest.parameters[name], value, err_msg=name)


def test_the_command_writes_a_head_of_its_target(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=1)
    first = train_draft(TINY, tmp_path / "a", recipe)
    assert train_draft(TINY, tmp_path / "a", recipe).checksum == first.checksum
    assert train_draft(TINY, tmp_path / "b", recipe).checksum == first.checksum
    target = Checkpoint(TINY)
    for directory in (first.plain, first.packed):
        head = load_draft_head(directory, target)
        assert head.config.version == "3.1" and head.config.draft_vocab_size == 256
        assert head.config.target_fingerprint == norms_fingerprint(target.manifest())
    assert first.acceptance.total.tokens_per_step >= 1.0
    with pytest.raises(UsageError, match="another recipe"):
        train_draft(TINY, tmp_path / "a", replace(recipe, rate=0.5))


def features_of(model: Model, ids: Sequence[int], layers: Sequence[int]) -> mx.array:
    """(L, features * D) what enters each of the layers, by a walk over them one by one."""
    h = model.embed(mx.array(ids))
    entering = []
    for layer in model.layers:
        entering.append(h)
        h = layer(h, mx.arange(len(ids)), [Span(1, len(ids), "causal")], [None])
    entering.append(h)
    return mx.concatenate([entering[layer] for layer in layers], axis=-1)


def loop(head: DraftHead, fused: mx.array, text: Encoded) -> tuple[int, list[int]]:
    """Steps of the target, and right guesses of each step, by drafting as a server does: chains, and a cache that is trimmed."""
    ids, caches = text.ids.tolist(), head.make_cache()
    place, entered, kept_by_step = int(np.argmax(text.counted)), 0, []
    while place < len(ids) - 1:
        # The true features of every position before the last known token.
        count = place - entered
        out = head(mx.array(ids[entered + 1 : place + 1]), fused[entered:place], [(count, caches)])[-1:]
        entered, kept = place, 0
        for guess in range(MOST_CHAIN):
            token = int(head.to_target_ids(mx.argmax(head.logits(out), axis=-1)).item())
            if place + 1 + guess >= len(ids) or token != ids[place + 1 + guess]:
                break
            kept += 1
            out = head(mx.array([token]), head.next_hidden(out), [(1, caches)])
        caches[0].trim(caches[0].offset - entered)
        kept_by_step.append(kept)
        place += kept + 1
    return len(kept_by_step), kept_by_step


def test_the_shipped_head_gives_two_tokens_a_step_and_a_plain_loop_counts_the_same(encoder: Encoder) -> None:
    target, model = Checkpoint(TINY), load(TINY, dtype="float32")
    head = load_draft_head(HEAD, target, model=model, dtype="float32")
    numpy_target = read_target(target, head.config)
    ids = np.array(head.to_target_ids(mx.arange(head.config.draft_vocab_size))).astype(np.int64)
    texts = acceptance.replies(model, encoder, count=1, seed=3)
    parameters = head_parameters(head, target)
    kinds = accepted(parameters, head.config, numpy_target, texts, ids)
    for found, some in zip(kinds, texts.values(), strict=True):
        counted = [
            loop(head, head.fuse(features_of(model, text.ids.tolist(), numpy_target.layers)), text) for text in some
        ]
        assert found.steps == sum(steps for steps, _ in counted)
        assert sum(found.right) == sum(sum(kept) for _, kept in counted)
    report = acceptance.AcceptanceReport(directory="", draft="", kinds=kinds)
    assert report.total.tokens_per_step >= 2.0


def test_features_one_layer_off_cost_acceptance(encoder: Encoder) -> None:
    """No error shows; that is why the layers' meaning is held by an oracle."""
    target, model = Checkpoint(TINY), load(TINY, dtype="float32")
    head = load_draft_head(HEAD, target, model=model, dtype="float32")
    right = read_target(target, head.config)
    wrong = replace(right, layers=tuple(layer + 1 for layer in right.layers))
    ids = np.array(head.to_target_ids(mx.arange(head.config.draft_vocab_size))).astype(np.int64)
    texts = acceptance.replies(model, encoder, count=1, seed=3)
    parameters = head_parameters(head, target)
    rates = []
    for numpy_target in (right, wrong):
        kinds = accepted(parameters, head.config, numpy_target, texts, ids)
        rates.append(acceptance.AcceptanceReport(directory="", draft="", kinds=kinds).total.tokens_per_step)
    assert rates[1] < 0.95 * rates[0]
