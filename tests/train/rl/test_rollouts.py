"""Rollouts by the engine: the trainer's log-probabilities on the same INT4 weights, one prefill for a group, the same for equal
seeds, and over stages that are processes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.client.demo import shipped_model
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch
from exo_kimi.train.export import read_parameters, write_checkpoint
from exo_kimi.train.model.forward import next_logits
from exo_kimi.train.rl.objective import log_probabilities
from exo_kimi.train.rl.prompts import FOCUS, KINDS
from exo_kimi.train.rl.rollouts import Completion, RolloutRequest, RolloutSampler

GROUP = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, disturbed so that it is unsure, as the trainer exports it."""
    directory = tmp_path_factory.mktemp("rollouts") / "policy"
    rng = np.random.default_rng(0)
    values = {
        name: value * (1 + np.float32(0.3 if "_proj" in name else 0) * rng.standard_normal(value.shape, np.float32))
        for name, value in read_parameters(shipped_model()).items()
    }
    write_checkpoint(directory, shipped_model(), values, layout="int4")
    return directory


@pytest.fixture(scope="module")
def requests(exported: Path) -> list[RolloutRequest]:
    encoder, rng = Encoder.from_directory(exported), Random(0)
    prompts = [KINDS[kind](rng) for kind in (FOCUS, "brief", "tool_calls")]
    return [
        RolloutRequest(
            prompt_ids=tuple(encoder.template.render(prompt.messages, prompt.tools).ids),
            seeds=tuple(range(GROUP * number, GROUP * (number + 1))),
        )
        for number, prompt in enumerate(prompts)
    ]


def sampler(directory: Path, *, stages: int = 1) -> RolloutSampler:
    stop_ids = Encoder.from_directory(directory).tokenizer.stop_ids
    return RolloutSampler(directory=directory, stop_ids=stop_ids, max_completion_length=24, stages=stages)


@pytest.fixture(scope="module")
def drawn(exported: Path, requests: list[RolloutRequest]) -> list[list[Completion]]:
    return sampler(exported).draw(requests)


def test_log_probabilities_are_the_trainers_on_the_same_int4_weights(
    exported: Path, requests: list[RolloutRequest], drawn: list[list[Completion]]
) -> None:
    parameters, config = read_parameters(exported), Checkpoint(exported).config
    wavelengths = np.array(Rope.of(config).wavelengths)
    seen = 0
    for request, group in zip(requests, drawn, strict=True):
        assert len(group) == GROUP
        for completion in group:
            ids = np.array([*request.prompt_ids, *completion.ids], np.int32)
            batch = make_batch([Encoded(ids=ids, counted=np.arange(len(ids)) >= len(request.prompt_ids))])
            found = log_probabilities(next_logits(parameters, config, wavelengths, batch), batch.targets)
            np.testing.assert_allclose(completion.logprobs, found, atol=2e-4)
            seen += len(completion.ids)
    assert seen > 100


def test_the_prompt_of_a_group_is_computed_once(requests: list[RolloutRequest], drawn: list[list[Completion]]) -> None:
    for request, group in zip(requests, drawn, strict=True):
        assert [each.cached_tokens for each in group] == [len(request.prompt_ids) - 1] * GROUP


def test_a_completion_ends_with_a_stop_token_or_at_the_most(exported: Path, drawn: list[list[Completion]]) -> None:
    stop_ids = sampler(exported).stop_ids
    ends = [completion.ids[-1] in stop_ids for group in drawn for completion in group]
    assert any(ends)
    for completion in (each for group in drawn for each in group):
        assert not set(completion.ids[:-1]) & stop_ids
        assert completion.ids[-1] in stop_ids or len(completion.ids) == 24


def test_the_same_seeds_draw_the_same_to_the_last_bit(
    exported: Path, requests: list[RolloutRequest], drawn: list[list[Completion]]
) -> None:
    assert sampler(exported).draw(requests) == drawn
    assert any(len({each.ids for each in group}) > 1 for group in drawn)


def test_two_stages_in_processes_draw_the_same_tokens(
    exported: Path, requests: list[RolloutRequest], drawn: list[list[Completion]]
) -> None:
    found = sampler(exported, stages=2).draw(requests[:1])
    assert [each.ids for each in found[0]] == [each.ids for each in drawn[0]]
    for other, each in zip(found[0], drawn[0], strict=True):
        np.testing.assert_allclose(other.logprobs, each.logprobs, atol=2e-4)
