"""Greedy tokens of a checkpoint do not depend on stages, chunks or company."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64}
SPLITS = ([7], [4, 3], [3, 2, 2], [1] * 7)
PROMPTS = (list(range(40, 70)), [300], list(range(500, 511)))
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), seed=2, config=SMALL)


def stages_of(directory: Path, split: list[int]) -> list[Model]:
    bounds = [0, *itertools.accumulate(split)]
    return [load(directory, start, end, dtype="float32") for start, end in itertools.pairwise(bounds)]


class Sequence:
    """A prompt and what came after, with its caches on every stage."""

    def __init__(self, stages: list[Model], prompt: list[int]) -> None:
        self.todo, self.generated = list(prompt), []
        self.caches = [stage.make_cache() for stage in stages]


def step(stages: list[Model], work: list[tuple[Sequence, int]]) -> None:
    """One pass: the next tokens of each sequence; those whose prompt is used up get a new token."""
    hidden = mx.array([token for sequence, count in work for token in sequence.todo[:count]])
    for index, stage in enumerate(stages):
        hidden = stage.forward_ragged(hidden, [(count, sequence.caches[index]) for sequence, count in work])
    ends = [end - 1 for end in itertools.accumulate(count for _, count in work)]
    chosen = mx.argmax(stages[-1].logits(hidden[mx.array(ends)]), axis=-1).tolist()
    for (sequence, count), token in zip(work, chosen, strict=True):
        del sequence.todo[:count]
        if not sequence.todo:
            sequence.generated.append(token)
            sequence.todo.append(token)


def alone(stages: list[Model], prompt: list[int], chunk: int) -> list[int]:
    sequence = Sequence(stages, prompt)
    while len(sequence.generated) < NEW_TOKENS:
        step(stages, [(sequence, min(chunk, len(sequence.todo)))])
    return sequence.generated


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    whole = stages_of(directory, [7])
    return [alone(whole, prompt, 1000) for prompt in PROMPTS]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_greedy_tokens_are_the_same_in_every_split_chunking_and_batch(
    directory: Path, expected: list[list[int]], split: list[int]
) -> None:
    stages = stages_of(directory, split)
    for chunk in (1, 7, 1000):
        assert [alone(stages, prompt, chunk) for prompt in PROMPTS] == expected
    together = [Sequence(stages, prompt) for prompt in PROMPTS]
    for turn in range(NEW_TOKENS + 10):
        # Later sequences join later, and prompts go in by nines: chunks and single tokens in one pass.
        joined = together[: 1 + turn // 2]
        step(stages, [(sequence, min(9, len(sequence.todo))) for sequence in joined])
    assert [sequence.generated[:NEW_TOKENS] for sequence in together] == expected
