"""A stage that runs one step ahead answers every step as one that does not, whatever the leader asks next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.runtime.engine.admission import Limits, check_request
from exo_kimi.runtime.engine.scheduler import Scheduler
from exo_kimi.runtime.engine.sequence import Sequence
from exo_kimi.runtime.pipeline import PipelineInfo, Ready
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Segment, SequenceStart, Step, StepResult

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_hidden_layers": 3,
}
GREEDY = SamplingParams(temperature=0.0, seed=0)
WILD = SamplingParams(temperature=1.5, top_p=0.95, seed=11)
PENALISED = SamplingParams(
    temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((7, 3.0),), min_p=0.01, seed=4
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory: Path = make_tiny(tmp_path_factory.mktemp("ahead") / "tiny", dtype="F32", seed=3, config=SMALL)
    return exo_kimi.load(directory, dtype="float32")


@dataclass(frozen=True)
class Arrival:
    """A request that comes before step `at`, and goes away before step `leaves`."""

    at: int
    prompt: int
    new: int
    sampling: SamplingParams = GREEDY
    leaves: int = 10_000


def run(model: Model, arrivals: list[Arrival], *, ahead: bool) -> tuple[list[list[int]], list[StepResult], StageWorker]:
    """What each request got, every answer, and the worker."""
    info = PipelineInfo(context=4096, kv_capacity_tokens=20 * CACHE_STEP, cache_step=CACHE_STEP, vocab_size=512)
    limits = Limits.of(info)
    scheduler = Scheduler(stages=1, prefill_chunk=64, max_running=10)
    scheduler.open(Ready(epoch=1, info=info), limits)
    worker = StageWorker(model, epoch=1, ahead=ahead)
    sequences: dict[int, Sequence] = {}
    results, at = list[StepResult](), 0
    while at <= max(arrival.at for arrival in arrivals) or scheduler.running or scheduler.waiting:
        for order, arrival in enumerate(arrivals):
            if arrival.at == at:
                prompt = tuple(np.random.default_rng(order).integers(0, 500, arrival.prompt).tolist())
                request = GenerationRequest(
                    request_id=str(order), prompt_ids=prompt, max_tokens=arrival.new, sampling=arrival.sampling
                )
                room = check_request(request, limits)
                sequences[order] = Sequence(request=request, order=order, max_new_tokens=room)
                scheduler.add(sequences[order])
            elif arrival.leaves == at:
                scheduler.end(sequences[order])
        at += 1
        if (step := scheduler.next_step()) is not None:
            result = worker.execute(step)
            worker.run_ahead()
            assert isinstance(result, StepResult) and scheduler.current is not None
            assert worker.kv_nbytes <= scheduler.current.ledger.reserved_tokens * bytes_of_token(model)
            results.append(result)
            for outcome in scheduler.complete(result):
                if outcome.sequence.finish_reason() is not None:
                    scheduler.end(outcome.sequence)
    return [sequence.tokens[sequence.prompt_tokens :] for sequence in sequences.values()], results, worker


def bytes_of_token(model: Model) -> int:
    config = model.args
    return (config.kv_lora_rank + config.qk_rope_head_dim) * 4 * len(model.layers)


@pytest.mark.parametrize(
    ("arrivals", "used"),
    [
        ([Arrival(0, 20, 12)], 11),
        ([Arrival(0, 5, 12), Arrival(0, 9, 20), Arrival(0, 1, 3)], 20),
        ([Arrival(0, 5, 25), Arrival(7, 70, 12), Arrival(12, 3, 30, leaves=22)], 20),
        ([Arrival(0, CACHE_STEP - 4, 12), Arrival(3, CACHE_STEP - 9, 12)], 8),
        ([Arrival(0, 5, 20, WILD), Arrival(4, 6, 8, PENALISED), Arrival(6, 1, 20)], 40),
    ],
    ids=["alone", "some end sooner", "some join, one is cancelled", "caches grow", "random, penalised, biased"],
)
def test_running_ahead_changes_no_answer(model: Model, arrivals: list[Arrival], used: int) -> None:
    expected, slow, worker = run(model, arrivals, ahead=False)
    assert worker.ahead.used == 0
    found, fast, worker = run(model, arrivals, ahead=True)
    assert found == expected
    assert fast == slow
    assert worker.ahead.used >= used


def start_of(seq_id: int) -> SequenceStart:
    return SequenceStart(seq_id=seq_id, prompt_tokens=4, sampling=GREEDY)


def step_of(offset: int, tokens: list[int], *, drafts: int = 0, begin: bool = False, mask: bytes | None = None) -> Step:
    segment = Segment(seq_id=0, offset=offset, length=len(tokens), sample=True, drafts=drafts, mask=mask)
    return Step(
        epoch=1,
        step_id=offset,
        segments=(segment,),
        tokens=np.array(tokens, np.int32),
        begin=(start_of(0),) if begin else (),
    )


NOTHING = Step(epoch=1, step_id=6, segments=(), tokens=np.zeros(0, np.int32))


@pytest.mark.parametrize("turn", ["another token", "guesses", "nothing", "a mask", "one that begins with its cache"])
def test_what_the_leader_does_not_ask_for_is_dropped(model: Model, turn: str) -> None:
    fast, slow = StageWorker(model, epoch=1), StageWorker(model, epoch=1, ahead=False)

    def both(step: Step) -> int:
        found, expected = fast.execute(step), slow.execute(step)
        fast.run_ahead()
        assert isinstance(found, StepResult) and found == expected
        return found.sampled[-1].token_id

    token = both(step_of(0, [1, 2, 3, 4], begin=True))
    token = both(step_of(4, [token]))
    token = both(step_of(5, [token]))
    assert fast.ahead.used == 2
    if turn == "another token":
        both(step_of(6, [(token + 1) % 500]))
    elif turn == "guesses":
        both(step_of(6, [token, 7, 8], drafts=2))
    elif turn == "nothing":
        fast.execute(NOTHING)
    elif turn == "a mask":
        both(step_of(6, [token], mask=bytes([0, 255] * 20)))
        assert (fast.ahead.used, fast.ahead.dropped) == (3, 0)  # it is for choosing
        return
    else:
        step = step_of(6, [token])
        copy = SequenceStart(seq_id=1, prompt_tokens=7, sampling=GREEDY, source=0, restore=5)
        segment = Segment(seq_id=1, offset=5, length=2, sample=True)
        tokens = np.array([token, 9, 9], np.int32)
        both(Step(epoch=1, step_id=6, segments=(*step.segments, segment), tokens=tokens, begin=(copy,)))
        assert (fast.ahead.used, fast.ahead.dropped) == (3, 0)  # not computed again beside what is new
        return
    assert (fast.ahead.used, fast.ahead.dropped) == (2, 1)
    offsets = [[cache.offset for cache in worker._sequences[0].caches] for worker in (fast, slow)]
    assert offsets[0] == offsets[1]
