"""Chunks of prefill by measured time: the gap is kept where the machine can, and prefill is never held up for nothing."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from exo_kimi.runtime.engine.pacing import CHUNKS_PER_STAGE, LEAST_WHILE_DECODING, PrefillPacer
from exo_kimi.runtime.steps import Step


@dataclass
class Machine:
    """Steps that take `fixed_s + per_token_s * tokens`, one at a time."""

    fixed_s: float
    per_token_s: float
    now_s: float = 0.0

    def run(self, pace: PrefillPacer, step_id: int, tokens: int) -> float:
        pace.sent(Step(epoch=1, step_id=step_id, segments=(), tokens=np.zeros(tokens, np.int32)))
        took_s = self.fixed_s + self.per_token_s * tokens
        self.now_s += took_s
        pace.answered(step_id)
        return took_s


def running(*pending: int, decoding: int = 0) -> list[SimpleNamespace]:
    filling = [SimpleNamespace(num_new_tokens=tokens, decoding=False) for tokens in pending]
    return [*filling, *(SimpleNamespace(num_new_tokens=1, decoding=True) for _ in range(decoding))]


def settled(machine: Machine, *, gap_s: float, first: tuple[int, ...] = (512, 300)) -> tuple[int, float]:
    """The chunk, and how long it takes, once some steps were seen."""
    pace = PrefillPacer(stages=2, prefill_chunk=512, gap_s=gap_s, clock=lambda: machine.now_s)
    for step_id, tokens in enumerate(first):
        machine.run(pace, step_id, tokens)
    took_s, tokens = 0.0, 0
    for step_id in range(10, 40):
        tokens = pace.chunk(running(5000, decoding=1))
        took_s = machine.run(pace, step_id, tokens)
    return tokens, took_s


@pytest.mark.parametrize("per_token_s", [0.0005, 0.002, 0.008])
def test_a_stream_that_decodes_waits_no_longer_than_the_gap(per_token_s):
    tokens, took_s = settled(Machine(fixed_s=0.0, per_token_s=per_token_s), gap_s=0.5)
    assert took_s <= 0.5 * 1.01
    assert tokens == 512 or took_s > 0.25  # and no less is done than may be, but for rounding


def test_where_a_step_costs_much_whatever_its_length_a_token_takes_at_most_twice_the_best():
    machine = Machine(fixed_s=0.6, per_token_s=0.004)  # reading all experts takes longer than the gap
    tokens, took_s = settled(machine, gap_s=0.5)
    assert took_s / tokens <= 2.5 * 0.004
    assert tokens < 512


def test_one_length_only_is_taken_as_all_per_token_and_mends_itself():
    tokens, took_s = settled(Machine(fixed_s=0.05, per_token_s=0.002), gap_s=0.5, first=(256, 256, 256))
    assert 0.3 < took_s <= 0.51
    assert tokens % LEAST_WHILE_DECODING == 0


@pytest.mark.parametrize("pending", [(20,), (64,), (5000,), (300, 40, 9)])
def test_where_a_stage_reads_experts_from_disk_a_prompt_alone_is_one_chunk(pending):
    streams = False
    pace = PrefillPacer(stages=4, prefill_chunk=2048, streams=lambda: streams)
    assert pace.chunk(running(*pending)) < sum(pending) or sum(pending) <= 20
    streams = True
    assert pace.chunk(running(*pending)) == 2048


def test_steps_of_decoding_do_not_count():
    machine = Machine(fixed_s=5.0, per_token_s=0.0)
    pace = PrefillPacer(stages=2, prefill_chunk=512, clock=lambda: machine.now_s)
    for step_id in range(5):
        machine.run(pace, step_id, 4)
    assert pace.per_token_s is None


def test_a_prompt_alone_is_cut_so_that_all_stages_work():
    pace = PrefillPacer(stages=2, prefill_chunk=512)
    assert pace.chunk(running(20_000)) == 512
    assert pace.chunk(running(3000)) == 3000 / (2 * CHUNKS_PER_STAGE)
    assert pace.chunk(running(100)) == 256
    assert pace.chunk(running(40)) == pace.chunk(running(20)) == 20
    assert pace.chunk(running(decoding=3)) == 512
    assert PrefillPacer(stages=1, prefill_chunk=512).chunk(running(2000)) == 512
    assert PrefillPacer(stages=2, prefill_chunk=64).chunk(running(2000)) == 64


def test_what_was_on_its_way_when_the_stages_failed_is_not_learnt_from():
    machine = Machine(fixed_s=0.0, per_token_s=0.1)
    pace = PrefillPacer(stages=2, prefill_chunk=512, clock=lambda: machine.now_s)
    pace.sent(Step(epoch=1, step_id=7, segments=(), tokens=np.zeros(64, np.int32)))
    pace.forget()
    pace.answered(7)
    assert pace.per_token_s is None


def test_a_step_costs_what_passes_between_two_answers():
    """A stage that runs ahead answers early, one of two at work waits for its turn: neither tells what a step costs."""
    clock = SimpleNamespace(now_s=100.0)
    pace = PrefillPacer(stages=2, prefill_chunk=512, clock=lambda: clock.now_s)

    def at(now_s: float, *, sent: int | None = None, answered: int | None = None) -> float | None:
        clock.now_s = now_s
        if sent is not None:
            pace.sent(Step(epoch=1, step_id=sent, segments=(), tokens=np.zeros(1, np.int32)))
        return None if answered is None else pace.answered(answered)

    at(100.0, sent=0)
    assert at(100.5, answered=0) == pytest.approx(0.5), "nothing was before it"
    at(100.6, sent=1)
    at(100.7, sent=2)
    assert at(101.0, answered=1) == pytest.approx(0.5), "the leader's own work is part of it"
    assert at(101.2, answered=2) == pytest.approx(0.2), "it was in flight beside the other"
    at(109.0, sent=3)
    assert at(109.5, answered=3) == pytest.approx(0.5), "nobody asked for anything meanwhile"
    assert at(110.0, answered=9) is None
