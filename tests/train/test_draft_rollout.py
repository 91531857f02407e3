"""The rollout in NumPy against the served head in MLX, step by step along real chains, and its gradients against MLX's own."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from exo_kimi.arch.draft_config import DraftConfig, DraftLatent
from exo_kimi.arch.draft_modules import DraftParts, draft_modules
from exo_kimi.checkpoint.tiny.draft import TinyDraftWeights, draft_raw_config
from exo_kimi.models.draft_head import DraftHead
from exo_kimi.models.rope import Rope
from exo_kimi.train.draft.rollout import RolloutBatch, rollout
from exo_kimi.train.model.layers import Floats, Parameters
from tests.train.conftest import RECIPE

STEPS = 3
SPANS = [(2, 6), (1, 9)]
ROWS = 21
TOLERANCE = 1e-4
CONFIGS = ("3", "3.1")


def head_config(version: str, more: dict[str, object] | None = None) -> DraftConfig:
    raw = draft_raw_config(RECIPE.config, kind="mla", version="3.1" if version == "3.1" else "3", draft_vocab_size=80)
    return DraftConfig.from_dict(raw | {"eagle_config": {}} | (more or {}))


def parameters_of(config: DraftConfig) -> Parameters:
    weights = TinyDraftWeights(config, 5)
    return {
        f"{spec.path}.weight": weights.weight(spec) for spec in draft_modules(config) if spec.path != "embed_tokens"
    }


def starts() -> list[int]:
    """The first row of every sequence."""
    found, row = [], 0
    for count, length in SPANS:
        found += [row + each * length for each in range(count)]
        row += count * length
    return found


def batch_of(config: DraftConfig) -> RolloutBatch:
    rng = np.random.default_rng(3)
    hidden = config.hidden_size
    going = np.array([1, 2, 4, 7, 13, 15, 16])
    return RolloutBatch(
        spans=SPANS,
        features=rng.standard_normal((ROWS, 3 * hidden)).astype(np.float32),
        embeddings=[rng.standard_normal((ROWS, hidden)).astype(np.float32) for _ in range(STEPS)],
        going=going,
        judged=[np.array([0, 2, 5, 12, 20]), np.array([0, 1, 4, 6]), np.array([2, 5])],
    )


def wavelengths(config: DraftConfig) -> Floats:
    assert isinstance(config.attention, DraftLatent)
    return np.array(Rope.of(config.attention).wavelengths)


def chains(head: DraftHead, batch: RolloutBatch) -> list[mx.array]:
    """The same logits by the served head: each judged row's chain alone, with a cache that holds the rows before it."""
    found: list[list[mx.array]] = [[] for _ in range(STEPS)]
    fused = head.fuse(mx.array(batch.features))
    for step in range(STEPS):
        for place in batch.judged[step].tolist():
            row = place if step == 0 else int(batch.going[place])
            first = max(start for start in starts() if start <= row)
            caches = head.make_cache()
            feed(head, batch.embeddings[0][first : row + 1])
            count = row + 1 - first
            out = head(mx.arange(count), fused[first : row + 1], [(count, caches)])[-1:]
            for later in range(1, step + 1):
                feed(head, batch.embeddings[later][row : row + 1])
                out = head(mx.array([0]), head.next_hidden(out), [(1, caches)])
            found[step].append(head.logits(out)[0])
    return [mx.stack(rows) for rows in found]


def feed(head: DraftHead, rows: Floats) -> None:
    """Let the head read these vectors as the embeddings of tokens 0, 1, ..."""
    table = mx.array(rows)
    head.borrow(embed_tokens=lambda ids: table[ids])


def head_of(config: DraftConfig, values: Parameters) -> DraftHead:
    head = DraftHead(config, DraftParts(embeds=False))
    assert {name for name, _ in tree_flatten(head.parameters())} == set(values)
    head.update(tree_unflatten([(name, mx.array(value)) for name, value in values.items()]))
    return head


@pytest.mark.parametrize("version", CONFIGS)
def test_a_rollout_is_what_chains_of_the_served_head_say(version: str) -> None:
    config = head_config(version)
    values, batch = parameters_of(config), batch_of(config)
    logits, _ = rollout(values, {}, config, wavelengths(config), batch)
    for found, expected in zip(logits, chains(head_of(config, values), batch), strict=True):
        wanted = np.array(expected)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("before", [False, True])
def test_gradients_are_those_of_mlx(version: str, before: bool) -> None:
    config = head_config(version, {"norm_before_residual": before})
    values, batch = parameters_of(config), batch_of(config)
    rng = np.random.default_rng(4)
    pulls: Sequence[Floats] = [
        rng.standard_normal((len(rows), config.draft_vocab_size)).astype(np.float32) for rows in batch.judged
    ]
    head = head_of(config, values)

    def pulled(parameters: dict[str, mx.array]) -> mx.array:
        head.update(tree_unflatten(list(parameters.items())))
        total = mx.array(0.0)
        for pull, given in zip(pulls, chains(head, batch), strict=True):
            total = total + (given * mx.array(pull)).sum()
        return total

    _, expected = mx.value_and_grad(pulled)({name: mx.array(value) for name, value in values.items()})
    gradients: Parameters = {}
    _, backward = rollout(values, gradients, config, wavelengths(config), batch)
    backward(pulls)
    assert set(gradients) == set(values)
    for name, found in gradients.items():
        wanted = np.array(expected[name])
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name
