"""Prefixes as the leader decides about them: random traffic over fake stages answers as if nothing had been cached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exo_kimi.runtime.engine.admission import Limits, check_request
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.scheduler import EpochScheduler, Scheduler
from exo_kimi.runtime.engine.sequence import Sequence
from exo_kimi.runtime.pipeline import DiskBlocks, PipelineInfo, Ready
from exo_kimi.runtime.requests import GenerationRequest
from exo_kimi.runtime.steps import Step, StepResult

BLOCK = 4
ACTIONS = ("add", "add", "next", "send", "send", "answer", "write", "cancel", "lose", "restart")
BUDGETS = (None, 0, 10 * BLOCK)


class Traffic:
    """A scheduler with prefixes over fake stages, one event at a time."""

    def __init__(
        self,
        fakes: SimpleNamespace,
        *,
        capacity: int = 1000 * BLOCK,
        disk_blocks: int = 0,
        stages: int = 2,
        **options: Any,
    ) -> None:
        self.fakes = fakes
        self.info = PipelineInfo(
            context=10_000,
            kv_capacity_tokens=capacity,
            cache_step=BLOCK,
            vocab_size=1000,
            kv_bytes_per_token=1,
            disk_blocks=disk_blocks,
        )
        memory = PrefixOptions(**options)
        self.scheduler = Scheduler(stages=stages, prefill_chunk=8, max_running=100, prefixes=memory)
        self.limits = Limits.of(self.info)
        self.stages = fakes.Stages(self.info)
        self.results: list[StepResult] = []
        self.steps: list[Step] = []
        self.news: list[tuple[str, ...]] = []
        self.sequences: list[Sequence] = []
        self.open(1)

    def open(self, epoch: int) -> None:
        blocks = tuple(tuple(self.stages.disk) for _ in range(2))
        self.scheduler.open(Ready(epoch=epoch, info=self.info, blocks=blocks), self.limits)

    @property
    def current(self) -> EpochScheduler:
        assert self.scheduler.current is not None
        return self.scheduler.current

    def add(self, prompt: tuple[int, ...], new: int, *, cached: bool = True) -> Sequence:
        request = GenerationRequest(request_id="", prompt_ids=prompt, max_tokens=new, use_prefix_cache=cached)
        order = len(self.sequences)
        sequence = Sequence(request=request, order=order, max_new_tokens=check_request(request, self.limits))
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def send(self) -> bool:
        step = self.scheduler.next_step()
        if step is None:
            return False
        self.steps.append(step)
        self.results.append(self.stages.execute(step))
        self.news += [blocks.keys for blocks in step.store]
        reserved = self.current.ledger.reserved_tokens
        assert self.stages.kv_tokens <= reserved <= self.info.kv_capacity_tokens
        return True

    def answer(self) -> bool:
        if not self.results:
            return False
        for outcome in self.scheduler.complete(self.results.pop(0)):
            if outcome.sequence.finish_reason() is not None:
                self.scheduler.end(outcome.sequence)
        return True

    def write(self) -> bool:
        """The stages tell of the oldest block that they wrote."""
        if not self.news:
            return False
        keys = self.news.pop(0)
        for stage in range(2):
            event = DiskBlocks(epoch=0, stage=stage, added=tuple(k for k in keys if k in self.stages.disk))
            gone = tuple(key for key in keys if key not in self.stages.disk)
            self.scheduler.on_disk_blocks(DiskBlocks(epoch=0, stage=stage, added=event.added, gone=gone))
        return True

    def lose(self) -> None:
        """A block vanishes from the disks; nobody has noticed yet."""
        if self.stages.disk:
            del self.stages.disk[next(iter(self.stages.disk))]

    def restart(self) -> None:
        """The stages lose all but their disks."""
        self.scheduler.fail()
        self.results.clear()
        self.news.clear()
        self.stages.held.clear()
        self.open(len(self.steps) + 2)

    def finish(self) -> None:
        for _ in range(100_000):
            if not (self.send() or self.answer() or self.write()):
                break
        assert not self.scheduler.waiting
        assert not self.scheduler.running

    def run(self, prompt: tuple[int, ...], new: int = 3, *, cached: bool = True) -> tuple[Sequence, list[Step]]:
        """One request alone; its steps."""
        before = len(self.steps)
        sequence = self.add(prompt, new, cached=cached)
        self.finish()
        assert sequence.tokens[len(prompt) :] == self.fakes.generation(prompt, new)
        return sequence, self.steps[before:]


def fed(steps: list[Step]) -> int:
    return sum(len(step.tokens) for step in steps)


prompts = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 14)), min_size=1, max_size=4)


def prompt_of(parts: list[tuple[str, int]]) -> tuple[int, ...]:
    """Prompts that share beginnings: runs of three texts, cut anywhere."""
    return tuple((ord(name) * 5 + index) % 1000 for name, length in parts for index in range(length))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_answers_as_without_a_cache(fakes: SimpleNamespace, data: st.DataObject) -> None:
    traffic = Traffic(
        fakes,
        capacity=data.draw(st.sampled_from((24 * BLOCK, 60 * BLOCK, 1000 * BLOCK))),
        disk_blocks=data.draw(st.sampled_from((0, 3, 50))),
        stages=data.draw(st.integers(1, 3)),
        memory_bytes=data.draw(st.sampled_from(BUDGETS)),
    )
    cancelled = set()
    for _ in range(data.draw(st.integers(5, 60))):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "add":
            cached = data.draw(st.integers(0, 4)) > 0
            traffic.add(prompt_of(data.draw(prompts)), data.draw(st.integers(1, 12)), cached=cached)
        elif action == "next" and traffic.sequences:
            before = data.draw(st.sampled_from(traffic.sequences))
            prompt, new_tokens = (*before.tokens, *prompt_of(data.draw(prompts))), data.draw(st.integers(1, 6))
            if len(prompt) + new_tokens <= 24 * BLOCK:  # or it could never fit
                traffic.add(prompt, new_tokens)
        elif action == "cancel" and traffic.sequences:
            sequence = data.draw(st.sampled_from(traffic.sequences))
            cancelled.add(sequence)
            traffic.scheduler.end(sequence)
        elif action == "restart":
            traffic.restart()
        elif action not in ("add", "next", "cancel"):
            getattr(traffic, action)()
    traffic.finish()
    for sequence in traffic.sequences:
        prompt = sequence.request.prompt_ids
        expected = fakes.generation(prompt, sequence.max_new_tokens)
        found = sequence.tokens[len(prompt) :]
        assert found == expected[: len(found)]
        assert sequence in cancelled or found == expected
    kept = traffic.current.prefixes.kept_tokens
    assert traffic.current.ledger.reserved_tokens == kept
    assert len(traffic.stages.held) == sum(1 for _ in traffic.current.prefixes.index)


def test_the_next_turn_feeds_only_what_is_new_and_copies_nothing(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes)
    first, _ = traffic.run(tuple(range(30)))
    turn = (*first.tokens, 7, 8, 9)
    second, steps = traffic.run(turn)
    assert [start.move for step in steps for start in step.begin] == [True]
    # All but the last generated token, which was never fed, were cached.
    assert second.cached_tokens == 32
    assert fed(steps) == len(turn) - 32 + 2


def test_a_shared_beginning_is_copied_and_both_conversations_go_on(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes)
    first, _ = traffic.run((*range(40), *range(100, 120)))
    other, steps = traffic.run((*range(40), *range(200, 220)))
    assert [(start.move, start.restore) for step in steps for start in step.begin] == [(False, 40)]
    assert other.cached_tokens == 40
    again, steps = traffic.run((*first.tokens, 1))
    assert again.cached_tokens == 62
    assert [start.move for step in steps for start in step.begin] == [True]


def test_requests_with_one_prompt_that_come_together_compute_it_once(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes)
    prompt = tuple(range(100))
    for _ in range(4):
        traffic.add(prompt, 1)
    traffic.finish()
    assert fed(traffic.steps) <= len(prompt) + 3 * BLOCK
    assert all(s.cached_tokens is not None and s.cached_tokens > 95 for s in traffic.sequences[1:])


def test_a_request_without_the_cache_computes_every_token_and_leaves_nothing(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, disk_blocks=1000)
    prompt = tuple(range(100))
    for _ in range(2):
        sequence, steps = traffic.run(prompt, new=1, cached=False)
        assert (fed(steps), sequence.cached_tokens) == (100, 0)
    assert traffic.current.prefixes.kept_tokens == 0 and not traffic.stages.disk and not traffic.stages.held
    traffic.run(prompt, new=1)
    sequence, steps = traffic.run(prompt, new=1, cached=False)  # nor does it take what others left
    assert (fed(steps), sequence.cached_tokens) == (100, 0)
    sequence, steps = traffic.run(prompt, new=1)
    assert sequence.cached_tokens == 99


def test_unused_prefixes_give_way_before_a_request_waits_or_is_preempted(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, capacity=16 * BLOCK)
    for start in (0, 300, 600):
        traffic.run(tuple(range(start, start + 30)), new=20)
    assert traffic.scheduler.counts.preemptions == 0
    assert traffic.scheduler.counts.prefixes.evictions == 2


def test_without_memory_for_a_copy_the_caches_are_taken_over(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, capacity=16 * BLOCK)
    traffic.run(tuple(range(50)))
    other, steps = traffic.run((*range(40), *range(200, 210)))
    assert [(start.move, start.restore) for step in steps for start in step.begin] == [(True, 40)]
    assert other.cached_tokens == 40


def test_a_memory_budget_is_kept(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, memory_bytes=10 * BLOCK)
    for start in range(0, 900, 100):
        traffic.run(tuple(range(start, start + 12)))
        assert traffic.current.prefixes.kept_tokens <= 10 * BLOCK


def test_after_a_restart_a_known_prefix_comes_from_the_disks(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, disk_blocks=1000)
    prompt = tuple(range(402))
    traffic.run(prompt, new=1)
    traffic.restart()
    sequence, steps = traffic.run(prompt)
    assert sequence.cached_tokens == 400
    assert fed(steps) == 2 + 2


@pytest.mark.parametrize("lost", [0, 57, 99])
def test_a_lost_block_is_computed_again(fakes: SimpleNamespace, lost: int) -> None:
    traffic = Traffic(fakes, disk_blocks=1000)
    prompt = tuple(range(402))
    traffic.run(prompt, new=1)
    traffic.restart()
    del traffic.stages.disk[list(traffic.stages.disk)[lost]]
    sequence, steps = traffic.run(prompt)
    assert sequence.cached_tokens == lost * BLOCK
    assert fed(steps) == 402 - lost * BLOCK + 2


def test_the_disks_keep_what_was_used_last(fakes: SimpleNamespace) -> None:
    traffic = Traffic(fakes, disk_blocks=20, memory_bytes=0)
    system = tuple(range(40))
    for start in range(100, 900, 40):
        traffic.run((*system, *range(start, start + 20)), new=1)
        assert len(traffic.stages.disk) <= 20
    traffic.restart()
    sequence, _ = traffic.run((*system, 999), new=1)
    assert sequence.cached_tokens == 40
