"""The scheduler alone: properties over random traffic, and the cases that each rule is for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exo_kimi.errors import ContextLengthError, ProtocolError, RequestError, StageDiedError
from exo_kimi.runtime.engine.admission import KvLedger, Limits, check_request
from exo_kimi.runtime.engine.scheduler import Scheduler
from exo_kimi.runtime.engine.sequence import Interruption, Sequence
from exo_kimi.runtime.engine.speculation import Drafter, StepBytes
from exo_kimi.runtime.pipeline import PipelineInfo, Ready
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.steps import Step, StepResult

STEP_BYTES = StepBytes(shared_bytes=10, expert_bytes=40, experts=8, experts_per_token=2, kv_token_bytes=1)
INFO = PipelineInfo(context=10_000, kv_capacity_tokens=100_000, cache_step=16, vocab_size=1000)


def request_of(prompt: int, new: int | None, first: int = 0, **fields: Any) -> GenerationRequest:
    ids = tuple((first + i) % 1000 for i in range(prompt))
    return GenerationRequest(request_id=str(first), prompt_ids=ids, max_tokens=new, **fields)


class Bench:
    """A scheduler over fake stages, driven one event at a time."""

    def __init__(self, fakes: SimpleNamespace, info: PipelineInfo = INFO, **options: Any) -> None:
        options = {"stages": 2, "prefill_chunk": 32, "max_running": 100} | options
        self.scheduler = Scheduler(**options)
        self.info, self.limits = info, Limits.of(info)
        self.scheduler.open(Ready(epoch=1, info=info), self.limits)
        self.stages = fakes.Stages(info)
        self.results: list[StepResult] = []
        self.order = 0
        self.steps: list[Step] = []

    def add(self, prompt: int, new: int | None) -> Sequence:
        request = request_of(prompt, new, first=self.order * 7)
        sequence = Sequence(request=request, order=self.order, max_new_tokens=check_request(request, self.limits))
        self.order += 1
        self.scheduler.add(sequence)
        return sequence

    def send(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is not None:
            self.steps.append(step)
            self.results.append(self.stages.execute(step))
            assert len(self.results) <= self.scheduler.stages
        self.look()
        return step

    def look(self) -> None:
        """What holds at any time."""
        for queue in (self.scheduler.waiting, self.scheduler.running):
            assert [s.order for s in queue] == sorted(s.order for s in queue)
        for sequence in self.scheduler.running:
            assert sequence.num_confirmed_tokens <= sequence.num_computed_tokens <= len(sequence.tokens)

    def answer(self) -> None:
        for outcome in self.scheduler.complete(self.results.pop(0)):
            outcome.sequence.interruption = None
            if outcome.sequence.finish_reason() is not None:
                self.scheduler.end(outcome.sequence)
        self.look()

    def fail(self) -> list[tuple[Sequence, bool]]:
        """The stages lose everything and come back in a new epoch."""
        current = self.scheduler.current
        assert current is not None
        epoch = current.epoch
        in_flight = {chunk.sequence for step in current.in_flight for chunk in step.chunks}
        lost = self.scheduler.fail()
        assert {s for s, flying in lost if flying} == {s for s in in_flight if s.state != "ended"}
        assert all(s.state == "waiting" for s, _ in lost)
        assert self.scheduler.next_step() is None
        self.results.clear()
        self.stages.held.clear()
        self.scheduler.open(Ready(epoch=epoch + 1, info=self.info), self.limits)
        return lost

    def send_all(self) -> list[Step]:
        steps = []
        while (step := self.send()) is not None:
            steps.append(step)
        return steps

    def run(self, limit: int = 100_000, *, to_the_end: bool = True) -> None:
        for _ in range(limit):
            self.send_all()
            if not self.results:
                return
            self.answer()
        assert not to_the_end, "it does not come to an end"


def generated(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.prompt_tokens :]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    stages=st.integers(1, 4),
    prefill_chunk=st.integers(1, 40),
    capacity_steps=st.integers(16, 30),
    max_running=st.integers(1, 12),
    drafts=st.sampled_from([0, 0, 1, 3, 8]),
)
def test_whatever_comes_every_sequence_gets_its_own_tokens_and_all_memory_comes_back(
    fakes: SimpleNamespace,
    data: st.DataObject,
    stages: int,
    prefill_chunk: int,
    capacity_steps: int,
    max_running: int,
    drafts: int,
) -> None:
    # A small allocation step and room for one to two of the longest: memory runs out all the time.
    info = PipelineInfo(context=64, kv_capacity_tokens=capacity_steps * 4 + 1, cache_step=4, vocab_size=1000)
    drafter = Drafter(step_bytes=STEP_BYTES, limit=drafts, always=True) if drafts else None
    bench = Bench(fakes, info, stages=stages, prefill_chunk=prefill_chunk, max_running=max_running, drafter=drafter)
    model = bench.stages.model = fakes.repeating_token if drafts else fakes.next_token
    sequences = [bench.add(prompt, 60 - prompt) for prompt in data.draw(st.lists(st.integers(1, 40), max_size=6))]
    cancelled: list[Sequence] = []
    for action in data.draw(st.lists(st.sampled_from("aassssprrrcf"), max_size=60)):
        if action == "a":
            prompt = data.draw(st.integers(1, 40))
            sequences.append(bench.add(prompt, data.draw(st.integers(1, 64 - prompt))))
        elif action == "s":
            bench.send()
        elif action == "r" and bench.results:
            bench.answer()
        elif action == "p":
            bench.run(data.draw(st.integers(1, 20)), to_the_end=False)
        elif action == "c" and sequences:
            victim = data.draw(st.sampled_from(sequences))
            bench.scheduler.end(victim)
            cancelled.append(victim)
        elif action == "f":
            for sequence, in_flight in bench.fail():
                if data.draw(st.integers(0, 3)) == 0:  # it may not survive
                    bench.scheduler.end(sequence)
                    cancelled.append(sequence)
                else:
                    found = sequence.interruption or Interruption(fault=StageDiedError("gone"))
                    found.suspicions += in_flight
                    sequence.interruption = found
    bench.run()
    for sequence in sequences:
        if sequence not in cancelled:
            prompt = sequence.request.prompt_ids
            assert generated(sequence) == fakes.generation(prompt, sequence.max_new_tokens, model)
    assert bench.stages.held == {}
    assert bench.scheduler.current is not None
    assert bench.scheduler.current.ledger.reserved_tokens == 0
    assert bench.scheduler.running == bench.scheduler.waiting == []
    begun = [start.seq_id for step in bench.steps for start in step.begin]
    if not bench.scheduler.counts.preemptions:
        assert begun == sorted(begun)


@pytest.mark.parametrize("stages", [1, 2, 3, 7])
def test_decoding_sequences_are_dealt_out_over_as_many_groups_as_there_are_stages(
    fakes: SimpleNamespace, stages: int
) -> None:
    bench = Bench(fakes, stages=stages, prefill_chunk=1000)
    sequences = [bench.add(3, 200) for _ in range(stages * 2)]
    for _ in range(60):
        bench.send_all()
        bench.answer()
    assert all(s.decoding for s in sequences)
    for _ in range(20):
        bench.send_all()
        assert len(bench.results) == stages
        assert [len(result.sampled) for result in bench.results] == [2] * stages
        bench.answer()


def test_two_requests_on_two_stages_are_never_in_one_step(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=2)
    bench.add(3, 20)
    bench.add(3, 20)
    bench.run()
    decodes = [step for step in bench.steps if step.segments and not step.begin]
    # Both prompts share the first step; from then on they alternate.
    assert all(len(step.segments) == 1 for step in decodes)


def test_chunks_of_one_prompt_follow_each_other_without_waiting_for_results(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=3, prefill_chunk=32)
    bench.add(100, 2)
    sent = bench.send_all()
    assert [[s.offset for s in step.segments] for step in sent] == [[0], [32], [64]]
    assert not any(s.sample for step in sent for s in step.segments)


def test_decoding_goes_on_in_every_step_while_a_long_prompt_is_filled(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=2, prefill_chunk=32)
    talker = bench.add(3, 500)
    for _ in range(4):
        bench.send_all()
        bench.answer()
    bench.add(3000, 2)
    before = talker.generated_tokens
    steps = len(bench.steps)
    for _ in range(40):
        bench.send_all()
        bench.answer()
    # One result in two is the talker's: it is in one of the two steps in flight.
    assert talker.generated_tokens - before >= 19
    assert all(len(step.tokens) <= 32 for step in bench.steps[steps:])


def test_a_prompt_is_filled_although_many_sequences_decode(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=1, prefill_chunk=8)
    for _ in range(40):
        bench.add(1, 400)
    for _ in range(30):
        bench.send_all()
        bench.answer()
    late = bench.add(20, 2)
    for _ in range(15):
        bench.send_all()
        bench.answer()
    assert late.generated_tokens == 2


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=1, prefill_chunk=32)
    long = bench.add(2000, 2)
    short = bench.add(10, 1)
    bench.send_all()
    bench.answer()
    assert short.generated_tokens == 1
    assert long.num_confirmed_tokens == 22


def test_the_head_of_the_queue_is_not_overtaken_by_what_would_fit(fakes: SimpleNamespace) -> None:
    info = PipelineInfo(context=1000, kv_capacity_tokens=64, cache_step=16, vocab_size=1000)
    bench = Bench(fakes, info, stages=1)
    first, big, small = bench.add(30, 3), bench.add(48, 3), bench.add(4, 3)
    bench.send_all()
    assert [s.state for s in (first, big, small)] == ["running", "waiting", "waiting"]
    bench.run()
    begun = [start.prompt_tokens for step in bench.steps for start in step.begin]
    assert begun == [30, 48, 4]


def test_the_youngest_gives_way_when_memory_runs_out_and_generates_the_same(fakes: SimpleNamespace) -> None:
    info = PipelineInfo(context=1000, kv_capacity_tokens=16 * 6, cache_step=16, vocab_size=1000)
    bench = Bench(fakes, info, stages=2)
    sequences = [bench.add(10, 60) for _ in range(3)]
    bench.run()
    assert bench.scheduler.counts.preemptions > 0
    for sequence in sequences:
        assert generated(sequence) == fakes.generation(sequence.request.prompt_ids, 60)
    resumed = [start for step in bench.steps for start in step.begin if start.history]
    assert resumed
    assert all(start.prompt_tokens == 10 for start in resumed)
    # The oldest never began twice.
    firsts = [step.tokens[0] for step in bench.steps for _ in step.begin[:1]]
    assert firsts.count(sequences[0].request.prompt_ids[0]) == 1


def test_a_preempted_sequence_waits_for_its_token_on_the_way_before_it_is_fed_again(fakes: SimpleNamespace) -> None:
    info = PipelineInfo(context=64, kv_capacity_tokens=72, cache_step=4, vocab_size=1000)
    bench = Bench(fakes, info, stages=3)
    sequences = [bench.add(5 + i, 40) for i in range(4)]
    waiting = bench.scheduler.waiting
    while not (waiting and waiting[0].awaiting_token and waiting[0].epoch):
        if bench.send() is None:
            bench.answer()
    victim = waiting[0]
    for sequence in sequences:
        if sequence is not victim:
            bench.scheduler.end(sequence)
    begun = len([start for step in bench.steps for start in step.begin])
    bench.send_all()
    assert len([start for step in bench.steps for start in step.begin]) == begun
    bench.run()
    assert generated(victim) == fakes.generation(victim.request.prompt_ids, 40)


def test_a_result_of_before_a_preemption_says_nothing_about_the_caches_of_after(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=2, prefill_chunk=16)
    sequence = bench.add(50, 5)
    bench.send_all()
    assert bench.scheduler.current is not None
    bench.scheduler.current.preempt(sequence)
    bench.answer()
    bench.send()
    bench.answer()
    assert sequence.num_confirmed_tokens == 0
    bench.run()
    assert generated(sequence) == fakes.generation(sequence.request.prompt_ids, 5)


def test_a_cancelled_sequence_is_freed_by_a_step_of_its_own_when_nothing_else_runs(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=2, prefill_chunk=8)
    sequence = bench.add(100, 5)
    bench.send()
    bench.scheduler.end(sequence)
    step = bench.send()
    assert step is not None
    assert step.free == (0,)
    assert step.segments == ()
    assert bench.stages.held == {}
    bench.run()


def test_a_sequence_that_never_reached_the_stages_is_not_freed_there(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=1)
    sequence = bench.add(5, 5)
    bench.scheduler.end(sequence)
    assert bench.send() is None


def test_after_a_failure_all_wait_and_it_is_known_what_touched_the_stages_and_was_on_its_way(
    fakes: SimpleNamespace,
) -> None:
    bench = Bench(fakes, stages=1, prefill_chunk=8, max_running=4)
    decoding = bench.add(1, 5)
    bench.run(2, to_the_end=False)
    touched = [bench.add(100, 5), bench.add(50, 5)]
    kept = [bench.add(3, 4), bench.add(2, 4)]
    bench.send()
    assert [s.state for s in kept] == ["running", "waiting"]
    leaving = bench.add(1, 1)
    bench.scheduler.end(touched[1])  # its memory was to be freed by the next step
    assert bench.fail() == [(decoding, True), (touched[0], True)]
    assert (decoding.num_computed_tokens, decoding.awaiting_token, leaving.state) == (0, False, "waiting")
    bench.run()
    for sequence in (decoding, touched[0], *kept, leaving):
        assert generated(sequence) == fakes.generation(sequence.request.prompt_ids, sequence.max_new_tokens)
    assert generated(touched[1]) == []


def test_what_may_have_brought_the_stages_down_is_begun_alone_and_first(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes, stages=2, prefill_chunk=8)
    one, suspect, accomplice = (bench.add(prompt, 5) for prompt in (20, 3, 4))
    for each in (suspect, accomplice):
        each.interruption = Interruption(fault=StageDiedError("gone"), suspicions=2)
    bench.send_all()
    assert bench.scheduler.running == [suspect]
    bench.answer()
    assert generated(suspect) == fakes.generation(suspect.request.prompt_ids, 1)
    bench.send()
    assert bench.scheduler.running == [suspect, accomplice], "the first one has proved itself, and goes on beside"
    while accomplice.interruption is not None:
        bench.send_all()
        assert one.state == "waiting"
        bench.answer()
    bench.send_all()
    assert bench.scheduler.running[0] is one
    bench.run()
    for sequence in (one, suspect, accomplice):
        assert generated(sequence) == fakes.generation(sequence.request.prompt_ids, 5)


def test_a_result_that_is_not_due_is_refused(fakes: SimpleNamespace) -> None:
    bench = Bench(fakes)
    bench.add(3, 3)
    step = bench.send()
    assert step is not None
    with pytest.raises(ProtocolError, match="not due"):
        bench.scheduler.complete(StepResult(epoch=1, step_id=step.step_id + 1, sampled=()))
    with pytest.raises(ProtocolError, match="other sequences"):
        bench.scheduler.complete(StepResult(epoch=1, step_id=step.step_id, sampled=()))


LIMITS = Limits(context=100, kv_capacity_tokens=70, cache_step=16, vocab_size=1000)


def test_a_prompt_that_leaves_no_token_is_refused_with_the_numbers() -> None:
    wide = Limits(context=100, kv_capacity_tokens=999, cache_step=1, vocab_size=1000)
    with pytest.raises(ContextLengthError, match="the prompt has 100 tokens, and the context holds 100") as full:
        check_request(request_of(100, 1), wide)
    assert full.value.expected == "a prompt of at most 99 tokens, which leaves one for the answer"
    assert check_request(request_of(99, 1), wide) == 1
    # 70 tokens are four whole allocation steps of 16; the last token generated is never cached.
    with pytest.raises(ContextLengthError, match="the prompt has 65 tokens, and the KV memory holds 64") as full:
        check_request(request_of(65, 16), LIMITS)
    assert full.value.expected == "a prompt of at most 64 tokens, which leaves one for the answer"
    assert check_request(request_of(64, 16), LIMITS) == 1
    with pytest.raises(ContextLengthError, match="prompt has 200"):
        check_request(request_of(200, None), LIMITS)


@given(prompt=st.integers(1, 120), wanted=st.none() | st.integers(1, 10**9))
def test_max_tokens_is_an_upper_limit_cut_to_what_is_left(prompt: int, wanted: int | None) -> None:
    unlimited = 65 - prompt  # what `test_without_max_tokens_...` gets
    if unlimited < 1:
        with pytest.raises(ContextLengthError):
            check_request(request_of(prompt, wanted), LIMITS)
    else:
        assert check_request(request_of(prompt, wanted), LIMITS) == min(unlimited, wanted or unlimited)


def test_without_max_tokens_a_request_may_fill_what_is_left() -> None:
    assert check_request(request_of(50, None), LIMITS) == 15
    wide = Limits(context=100, kv_capacity_tokens=999, cache_step=1, vocab_size=1000)
    assert check_request(request_of(60, None), wide) == 40


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"logit_bias": ((1000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"top_logprobs": -1}, "top_logprobs"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(request_of(3, 3, sampling=SamplingParams(**params)), LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize("ids", [(), (-1,), (5, 1000)])
def test_a_prompt_that_is_empty_or_outside_the_vocabulary_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(RequestError):
        check_request(GenerationRequest(request_id="r", prompt_ids=ids, max_tokens=1), LIMITS)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), max_size=40))
def test_the_ledger_holds_whole_steps_and_never_more_than_there_is(growths: list[tuple[int, int]]) -> None:
    ledger = KvLedger(LIMITS)
    held: dict[int, int] = {}
    for seq_id, tokens in growths:
        wanted = max(held.get(seq_id, 0), -(-tokens // 16) * 16)
        fits = sum(held.values()) - held.get(seq_id, 0) + wanted <= 70
        assert ledger.reserve(seq_id, tokens) == fits
        if fits:
            held[seq_id] = wanted
        assert ledger.reserved_tokens == sum(held.values())
    for seq_id in range(4):
        ledger.release(seq_id)
    assert ledger.reserved_tokens == 0
