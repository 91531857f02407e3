"""Our Builder and Engine without exo: two ranks in this process, driven as exo's runner drives them, with types of its shape."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_kimi.checkpoint.text_files import read_kimi_config
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import (
    CheckpointProblems,
    ExoError,
    ExoKimiError,
    KeyMismatchError,
    StageDiedError,
    StageOutOfMemoryError,
    StageStalledError,
    StageUnreachableError,
)
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.runner import builder as exo_builder
from exo_kimi.plugin.runner import engine as exo_engine
from exo_kimi.plugin.runner import judge
from exo_kimi.plugin.runner import leader as exo_leader
from exo_kimi.plugin.runner.advice import advise
from exo_kimi.plugin.runner.builder import KimiBuilder
from exo_kimi.plugin.runner.chunks import ExoTypes
from exo_kimi.runtime.requests import EngineSnapshot
from tests.plugin.seeing import picture, text_about

MODEL = "lab/kimi-k2-tiny"
SECONDS = 30.0


@pytest.fixture(scope="module")
def types(exo_shapes: ModuleType) -> ExoTypes:
    made: ExoTypes = exo_shapes.exo_types()
    return made


class Cancelled:
    """exo's pipe of cancelled tasks."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def collect(self) -> list[str]:
        taken, self.waiting = self.waiting, []
        return taken


class Told:
    """What a rank tells exo of itself."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.is_held = False
        self.explained = ""
        self.ended: list[tuple[ExoKimiError, list[str]]] = []

    def hold(self, why: str) -> None:
        self.is_held = True
        self.held.append(why)

    def release(self) -> None:
        self.is_held = False

    def explain(self, how: str) -> None:
        self.explained = how

    def end(self, error: ExoKimiError, command_ids: Iterable[str]) -> None:
        self.ended.append((error, list(command_ids)))


class Ranks:
    """Both runners of an instance, each step of exo's states at once on both."""

    def __init__(self, instance: Callable[..., Any], directory: Path, types: ExoTypes, split: tuple[int, ...]) -> None:
        self.params = instance.params  # type: ignore[attr-defined]
        self.pipes = [Cancelled() for _ in split]
        self.bound = [instance(split, rank) for rank in range(len(split))]
        self.told = [Told() for _ in split]
        self.builders = [
            KimiBuilder(MODEL, told, pipe, types=types, find_directory=lambda _: directory)
            for told, pipe in zip(self.told, self.pipes, strict=True)
        ]
        self.engines: list[Any] = []
        self.progress: list[list[Any]] = []

    def start(self) -> None:
        if len(self.builders) > 1:
            together(lambda rank: self.builders[rank].connect(self.bound[rank]), len(self.builders))
        self.progress = together(lambda rank: list(self.builders[rank].load(self.bound[rank])), len(self.builders))
        self.engines = [builder.build() for builder in self.builders]
        together(lambda rank: self.engines[rank].warmup(), len(self.engines))

    def submit(self, task_id: str, prompt: str, **options: Any) -> None:
        for engine in self.engines:
            engine.submit(self.task(task_id, prompt, **options))

    def task(self, task_id: str, prompt: str, **options: Any) -> Any:
        params = self.params(prompt, **options)
        return SimpleNamespace(task_id=task_id, command_id=f"command-{task_id}", task_params=params)

    def run(self, rank: int, until: Callable[[list[tuple[str, Any]]], bool]) -> list[tuple[str, Any]]:
        """Steps of one rank until something has come out of it."""
        found: list[tuple[str, Any]] = []
        deadline = time.monotonic() + SECONDS
        while not until(found):
            assert time.monotonic() < deadline, found[-5:]
            found += self.engines[rank].step()
        return found

    def stages(self) -> list[Any]:
        return [builder._connected.host.status for builder in self.builders]  # type: ignore[union-attr]

    def close(self) -> None:
        for each in self.engines or self.builders:
            each.close()


def together(work: Callable[[int], Any], count: int) -> list[Any]:
    """Run for every rank in a thread of its own; the first error is raised."""
    found: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except Exception as error:  # noqa: BLE001  # raised again below, in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    while any(thread.is_alive() for thread in threads) and not errors and time.monotonic() < deadline:
        time.sleep(0.02)
    if errors:  # the others may wait for the one that failed until it is closed
        raise errors[0]
    return found


def ended(*task_ids: str) -> Callable[[list[tuple[str, Any]]], bool]:
    """Whether all of these tasks are over."""
    kinds = ("FinishedResponse", "CancelledResponse")
    return lambda found: {task for task, each in found if each.kind in kinds} >= set(task_ids)


def text(found: list[tuple[str, Any]], task_id: str) -> str:
    return "".join(each.text for task, each in found if task == task_id and each.kind == "TokenChunk")


@pytest.fixture(scope="module")
def ranks(exo_instance: Callable[..., Any], tiny: Path, types: ExoTypes) -> Iterator[Ranks]:
    made = Ranks(exo_instance, tiny, types, (5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXO_KIMI_PREFIX_CACHE_BYTES", "0")  # so that what ended holds no memory, which is looked at
        made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Callable[[str, int], str]:
    """The oracle: greedy text of the whole model in this thread."""
    import mlx.core as mx

    from exo_kimi import load

    speaker, model = Speaker.from_directory(tiny), load(tiny)

    def answer(prompt: str, tokens: int) -> str:
        cache, found = model.make_cache(), []
        ids = speaker.template.render([{"role": "user", "content": prompt}]).ids
        for _ in range(tokens):
            token = int(mx.argmax(model(mx.array([ids]), cache)[0, -1]).item())
            if token in speaker.tokenizer.stop_ids:
                break
            found.append(token)
            ids = [token]
        return speaker.tokenizer.decode(found)

    return answer


def test_every_rank_loads_its_own_layers_and_says_how_far_it_is(ranks: Ranks) -> None:
    ends = [(each[-1].layers_loaded, each[-1].total) for each in ranks.progress]
    assert ends == [(5, 5), (2, 2)]
    for each in ranks.progress:
        counts = [one.layers_loaded for one in each]
        assert counts == sorted(counts)


def test_rank_0_answers_as_one_process_does_and_all_ranks_finish(ranks: Ranks, alone: Any) -> None:
    ranks.submit("t1", "Tell me about the sea.", max_output_tokens=12)
    found = ranks.run(0, ended("t1"))
    assert text(found, "t1") == alone("Tell me about the sea.", 12)
    last = found[-2][1]
    assert (last.kind, last.finish_reason, last.usage.completion_tokens) == ("TokenChunk", "length", 12)
    assert [each.kind for _, each in ranks.run(1, ended("t1"))] == ["FinishedResponse"]


def test_several_tasks_at_once_answer_as_each_alone(ranks: Ranks, alone: Any) -> None:
    prompts = {f"m{i}": prompt for i, prompt in enumerate(("one", "two of them", "three little birds"))}
    for task_id, prompt in prompts.items():
        ranks.submit(task_id, prompt, max_output_tokens=10)
    found = ranks.run(0, ended(*prompts))
    assert {task: text(found, task) for task in prompts} == {task: alone(p, 10) for task, p in prompts.items()}
    ranks.run(1, ended(*prompts))


def test_a_cancelled_task_ends_on_every_rank_and_frees_its_caches(ranks: Ranks) -> None:
    ranks.submit("c1", "river")
    ranks.run(0, lambda found: len(found) > 3)
    deadline = time.monotonic() + SECONDS
    while not all(stage.sequences == 1 and stage.kv_bytes > 0 for stage in ranks.stages()):
        assert time.monotonic() < deadline
        ranks.run(0, lambda found: bool(found))
    for pipe in ranks.pipes:
        pipe.waiting.append("c1")
    for rank in (0, 1):
        assert ranks.run(rank, ended("c1"))[-1][1].kind == "CancelledResponse"
    while any(stage.sequences or stage.kv_bytes for stage in ranks.stages()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not any(task == "c1" for task, _ in ranks.engines[0].step())  # exo's runner has forgotten it


def test_cancelling_everything_ends_every_task(ranks: Ranks, types: ExoTypes) -> None:
    for task_id in ("a1", "a2"):
        ranks.submit(task_id, "river")
    for rank, pipe in enumerate(ranks.pipes):
        pipe.waiting.append(types.cancel_all)
        ranks.run(rank, ended("a1", "a2"))


def test_a_task_that_was_cancelled_before_it_came_is_ended(ranks: Ranks) -> None:
    for rank, engine in enumerate(ranks.engines):
        ranks.pipes[rank].waiting.append("early")
        assert engine.should_cancel("early")
    ranks.submit("early", "river")
    for rank in (0, 1):
        assert ranks.run(rank, ended("early"))[-1][1].kind == "CancelledResponse"


def test_a_rank_that_hears_of_the_end_before_the_task_finishes_it(ranks: Ranks) -> None:
    task = ranks.task("late", "one", max_output_tokens=2)
    ranks.engines[0].submit(task)
    ranks.run(0, ended("late"))
    time.sleep(0.2)
    ranks.engines[1].submit(task)
    assert ranks.run(1, ended("late"))[-1][1].kind == "FinishedResponse"


def test_a_request_that_cannot_be_served_is_an_error_chunk_and_ends(ranks: Ranks) -> None:
    ranks.submit("long", "a " * 131_072)
    shown = [{"role": "user", "content": [{"type": "image"}]}]
    ranks.submit("seen", "a", images=["aGk="], chat_template_messages=shown)
    found = ranks.run(0, ended("long", "seen"))
    errors = {task: each.error_message for task, each in found if each.kind == "ErrorChunk"}
    assert "131072" in errors["long"] and "images are not supported" in errors["seen"]
    ranks.run(1, ended("long", "seen"))


def test_prefill_for_others_is_refused(ranks: Ranks) -> None:
    with pytest.raises(ExoError, match="does not prefill"):
        ranks.engines[0].serve_prefill(SimpleNamespace(request_id="r"), None)


def test_one_rank_needs_no_connection(exo_instance: Any, tiny: Path, types: ExoTypes, alone: Any) -> None:
    single = Ranks(exo_instance, tiny, types, (7,))
    try:
        single.start()
        single.submit("s", "one", max_output_tokens=5)
        assert text(single.run(0, ended("s")), "s") == alone("one", 5)
    finally:
        single.close()


def test_three_ranks_answer_as_one_process(exo_instance: Any, tiny: Path, types: ExoTypes, alone: Any) -> None:
    three = Ranks(exo_instance, tiny, types, (3, 2, 2))
    try:
        three.start()
        three.submit("t", "one", max_output_tokens=5)
        assert text(three.run(0, ended("t")), "t") == alone("one", 5)
        for rank in (1, 2):
            three.run(rank, ended("t"))
    finally:
        three.close()


@pytest.mark.parametrize(("link", "how"), [("ring", "over RDMA, rdma_en1"), ("jaccl", "could not be used")])
def test_two_ranks_on_rdma_answer_as_one_process_over_a_stand_in_and_over_addresses_without(
    exo_instance: Any,
    exo_shapes: ModuleType,
    tiny: Path,
    types: ExoTypes,
    alone: Any,
    monkeypatch: pytest.MonkeyPatch,
    link: str,
    how: str,
) -> None:
    """No machine here has RDMA: mx.distributed's ring stands in for jaccl, and jaccl itself fails as it does without."""
    monkeypatch.setattr(exo_leader, "RDMA_LINK", link)
    pair = Ranks(exo_instance, tiny, types, (5, 2))
    pair.bound = [exo_instance((5, 2), rank, kind=exo_shapes.MlxJacclInstance) for rank in (0, 1)]
    try:
        pair.start()
        pair.submit("t", "one", max_output_tokens=5)
        assert text(pair.run(0, ended("t")), "t") == alone("one", 5)
        assert how in pair.told[0].explained
    finally:
        pair.close()


def test_ranks_that_have_only_their_own_layers_files_answer_as_one_process(
    exo_instance: Any, tiny: Path, types: ExoTypes, alone: Any, tmp_path: Path
) -> None:
    shares = [
        prepare(tiny, tmp_path / str(rank), model_id=MODEL, start_layer=start, end_layer=end).directory
        for rank, (start, end) in enumerate(((0, 5), (5, 7)))
    ]
    pair = Ranks(exo_instance, tiny, types, (5, 2))
    for builder, share in zip(pair.builders, shares, strict=True):
        builder._find_directory = lambda _, share=share: share  # type: ignore[misc]
    try:
        pair.start()
        pair.submit("t", "one", max_output_tokens=5)
        assert text(pair.run(0, ended("t")), "t") == alone("one", 5)
    finally:
        pair.close()


def test_ranks_with_different_models_under_one_name_do_not_start(
    exo_instance: Any, tiny: Path, types: ExoTypes, tmp_path: Path
) -> None:
    other = make_tiny(tmp_path / "other", dtype="F32", config={"num_hidden_layers": 7, "rope_theta": 10_000.0})
    pair = Ranks(exo_instance, tiny, types, (5, 2))
    pair.builders[1]._find_directory = lambda _: other
    try:
        with pytest.raises(ExoKimiError, match="two nodes have different models under one name"):
            pair.start()
    finally:
        pair.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge in a second what takes a minute."""
    monkeypatch.setattr(
        judge.Judge.__init__, "__kwdefaults__", {"quiet_s": 1.5, "hopeless_s": 1.0, "clock": time.monotonic}
    )
    monkeypatch.setattr(exo_engine, "TICK_S", 0.1)
    monkeypatch.setattr(exo_leader, "TICK_S", 0.1)


@pytest.mark.usefixtures("hurry")
def test_an_idle_rank_is_not_ready_and_ends_when_rank_0_is_gone(exo_instance: Any, tiny: Path, types: ExoTypes) -> None:
    pair = Ranks(exo_instance, tiny, types, (2, 5))
    try:
        pair.start()
        until(lambda: not pair.told[1].is_held)
        pair.engines[0].close()
        until(lambda: bool(pair.told[1].ended))
        error, waiting = pair.told[1].ended[0]
        assert isinstance(error, StageDiedError) and "rank 0 is gone" in str(error) and waiting == []
        assert "rank 0" in pair.told[1].held[0] and pair.told[1].is_held
    finally:
        pair.close()


@pytest.mark.usefixtures("hurry")
def test_rank_0_is_not_ready_and_ends_when_another_is_gone_and_tells_who_waits(
    exo_instance: Any, tiny: Path, types: ExoTypes
) -> None:
    pair = Ranks(exo_instance, tiny, types, (2, 5))
    try:
        pair.start()
        until(lambda: not pair.told[0].is_held)
        pair.engines[1].close()
        until(lambda: pair.told[0].is_held)
        pair.engines[0].submit(pair.task("t", "one"))
        until(lambda: bool(pair.told[0].ended))
        error, waiting = pair.told[0].ended[0]
        assert "the stages did not come together again" in str(error) and "rank 1" in str(error.found)
        assert waiting in ([], ["command-t"])  # where the engine had given it up before, it has its error
        assert any(each.kind == "ErrorChunk" for _, each in pair.engines[0].step()) or waiting
    finally:
        pair.close()


def test_a_runner_whose_engine_has_broken_ends(exo_instance: Any, tiny: Path, types: ExoTypes) -> None:
    """It refused every task for ever, and said that it was ready."""
    pair = Ranks(exo_instance, tiny, types, (2, 5))
    try:
        pair.start()

        def fail(_: object) -> None:
            raise ZeroDivisionError("a bug")

        pair.engines[0]._leader.engine._on_result = fail  # type: ignore[method-assign, union-attr]
        pair.engines[0].submit(pair.task("t", "one"))
        until(lambda: bool(pair.told[0].ended))
        error, _ = pair.told[0].ended[0]
        assert "the engine stopped" in str(error) and "a bug" in str(error)
    finally:
        pair.close()


def test_a_rank_that_has_lost_rank_0_finds_it_again_and_hears_what_ended_meanwhile(ranks: Ranks) -> None:
    reader: Any = ranks.builders[1]._connected.others  # type: ignore[union-attr]
    ranks.submit("gap", "one", max_output_tokens=2)
    reader._channel.close()
    ranks.run(0, ended("gap"))
    reader._on_lost(StageUnreachableError("the connection was lost"))
    assert reader.lost is not None
    assert ranks.run(1, ended("gap"))[-1][1].kind == "FinishedResponse"
    until(lambda: reader.lost is None and reader.silent_s < 2)


def test_a_missing_tensor_is_refused_before_this_rank_connects(
    exo_instance: Any, tiny: Path, types: ExoTypes, tmp_path: Path, lose_tensor: Callable[[Path, Path, str], None]
) -> None:
    name = "model.layers.6.self_attn.o_proj.weight"
    lose_tensor(tiny, tmp_path / "broken", name)
    broken = Ranks(exo_instance, tmp_path / "broken", types, (5, 2))
    with pytest.raises(CheckpointProblems, match=name):
        broken.builders[1].connect(broken.bound[1])


def test_the_context_and_the_cache_budget_of_the_environment_are_the_limits(
    exo_instance: Callable[..., Any],
    tiny: Path,
    types: ExoTypes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("EXO_KIMI_CONTEXT", "64")
    monkeypatch.setenv("EXO_KIMI_KV_BYTES", "100MB")
    ranks = Ranks(exo_instance, tiny, types, (7,))
    try:
        ranks.start()
        with caplog.at_level("INFO", logger="exo_kimi.plugin.runner.leader"):
            ranks.submit("long", "hello " * 30)
            ranks.submit("wide", "hello", max_output_tokens=10**6)
            ranks.submit("short", "hello", max_output_tokens=4)
            found = ranks.run(0, ended("long", "wide", "short"))
        options = ranks.builders[0]._connected.others.engine.pipeline.options  # type: ignore[union-attr]
    finally:
        ranks.close()
    ((refused, error),) = [(task, each.error_message) for task, each in found if each.kind == "ErrorChunk"]
    assert refused == "long" and "the context holds 64" in error and text(found, "short")
    (usage,) = [each.usage for task, each in found if task == "wide" and getattr(each, "usage", None)]
    assert usage.total_tokens <= 64 and text(found, "wide")
    assert f"max_tokens 1000000 was cut to {64 - usage.prompt_tokens}" in caplog.text
    assert options.kv_bytes == 100_000_000


def test_a_node_that_is_too_small_streams_its_experts_and_answers_the_same(
    exo_instance: Callable[..., Any], tiny: Path, types: ExoTypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> tuple[str, list[Any]]:
        ranks = Ranks(exo_instance, tiny, types, (5, 2))
        try:
            ranks.start()
            ranks.submit("task", "hello", max_output_tokens=8, temperature=0.0)
            found = ranks.run(0, ended("task"))
            for status in (statuses := ranks.stages()):
                deadline = time.monotonic() + SECONDS
                while status.experts is not None and not status.experts.hits + status.experts.misses:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            return text(found, "task"), [status.experts for status in statuses]
        finally:
            ranks.close()

    expected, experts = answer()
    assert experts == [None, None]
    monkeypatch.setenv("EXO_KIMI_EXPERT_CACHE", "1MB")
    found, experts = answer()
    assert found == expected
    assert all(each.read_bytes > 0 and each.slot_bytes <= 10**6 for each in experts)


def test_a_draft_head_guesses_on_the_last_rank_and_the_answer_is_the_same(
    exo_instance: Callable[..., Any],
    tiny: Path,
    types: ExoTypes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer() -> tuple[str, EngineSnapshot, Any]:
        ranks = Ranks(exo_instance, tiny, types, (5, 2))
        try:
            ranks.start()
            ranks.submit("task", "hello", max_output_tokens=24, temperature=0.0)
            found = ranks.run(0, ended("task"))
            snapshot = ranks.builders[0]._connected.others.engine.snapshot()  # type: ignore[union-attr]
            return text(found, "task"), snapshot, found[-2][1].usage.completion_tokens_details
        finally:
            ranks.close()

    expected, plain, _ = answer()
    assert plain.head_drafts_by_position == ()
    head = make_tiny_draft(tmp_path / "head", read_kimi_config(tiny), draft_vocab_size=200)
    monkeypatch.setenv("EXO_KIMI_DRAFT", str(head))
    monkeypatch.setenv("EXO_KIMI_DRAFT_TOKENS", "2")
    found, drafted, told = answer()
    assert found == expected
    assert drafted.draft_tokens_total > 10 and drafted.head_undrafted_total == 0
    accepted = drafted.draft_tokens_accepted_total
    assert told.accepted_prediction_tokens == accepted
    assert told.rejected_prediction_tokens > 10


def test_the_context_of_the_placed_instance_is_the_limit(
    exo_instance: Callable[..., Any], tiny: Path, types: ExoTypes
) -> None:
    ranks = Ranks(exo_instance, tiny, types, (7,))
    try:
        ranks.bound[0].bound_shard.model_card.context_length = 64
        ranks.start()
        ranks.submit("wide", "hello", max_output_tokens=10**6)
        (*_, (_, last), _) = ranks.run(0, ended("wide"))
        assert ranks.builders[0]._connected.others.engine.snapshot().context == 64  # type: ignore[union-attr]
    finally:
        ranks.close()
    assert last.usage.total_tokens <= 64


def test_a_prompt_that_was_answered_before_is_not_read_again(
    exo_instance: Callable[..., Any], tiny: Path, types: ExoTypes
) -> None:
    ranks = Ranks(exo_instance, tiny, types, (7,))
    asked: dict[str, dict[str, Any]] = {
        "first": {},
        "second": {},
        "bench": {"bench": True},
        "bench with cache": {"bench": True, "use_prefix_cache": True},
        "longer": {"prompt": "The same long words again. " * 10 + "But longer."},
    }
    last: dict[str, Any] = {}
    said = {}
    try:
        ranks.start()
        for task, options in asked.items():
            ranks.submit(task, **{"prompt": "The same long words again. " * 10, "max_output_tokens": 4} | options)
            chunks = ranks.run(0, ended(task))
            said[task] = text(chunks, task)
            (last[task],) = [each for _, each in chunks if each.kind == "TokenChunk" and each.usage is not None]
    finally:
        ranks.close()
    assert said["first"] == said["second"] == said["bench"]
    cached = {task: each.usage.prompt_tokens_details.cached_tokens for task, each in last.items()}
    assert cached["first"] == cached["bench"] == 0 < cached["longer"] < cached["second"] == cached["bench with cache"]
    assert {task: each.stats.prefix_cache_hit for task, each in last.items()} == {
        "first": "none",
        "second": "exact",
        "bench": "none",
        "bench with cache": "exact",
        "longer": "partial",
    }
    # Speed is of what was computed: a hit does not make it thousands of tokens per second.
    assert last["second"].stats.prompt_tps < last["first"].stats.prompt_tps * 3


def test_an_error_inside_exo_tells_what_can_be_done_at_exo(
    exo_instance: Any, tiny: Path, types: ExoTypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody starts `exo-kimi stage` there: rank 0 listens nowhere, and rank 1 says so."""
    monkeypatch.setattr(exo_builder, "READY_S", 0.5)
    made = KimiBuilder(MODEL, Told(), Cancelled(), types=types, find_directory=lambda _: tiny)
    try:
        with pytest.raises((StageUnreachableError, StageStalledError)) as caught:  # whichever deadline is first
            made.connect(exo_instance((4, 3), 1))
    finally:
        made.close()
    assert "exo" in str(caught.value.fix) and "exo-kimi stage" not in str(caught.value)


@pytest.mark.parametrize("kind", [StageUnreachableError, StageStalledError, StageOutOfMemoryError, KeyMismatchError])
def test_remedies_speak_of_exo_and_one_that_does_already_stays(kind: type[ExoKimiError]) -> None:
    told = advise(kind("x", fix="start it with `exo-kimi stage --listen ADDR`")).fix
    assert told is not None and "exo" in told and "exo-kimi stage" not in told
    assert advise(kind("x", fix="see `exo-kimi exo run`")).fix == "see `exo-kimi exo run`"
    assert advise(ExoKimiError("x", fix="as it was")).fix == "as it was"


def test_a_picture_is_answered_as_one_process_answers(
    exo_instance: Callable[..., Any], types: ExoTypes, tmp_path: Path
) -> None:
    """The tower comes from the repository that exo's card names: the text model's directory has none."""
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 7}
    config = {**small, "n_routed_experts": 4}
    plain = {"recipe": "plain", "dtype": "F32", "template": "k25", "config": config}
    seeing = make_tiny(tmp_path / "seeing", vision=True, **plain)
    blind = make_tiny(tmp_path / "blind", prefix=True, **plain)
    made = Ranks(exo_instance, blind, types, (5, 2))
    for bound, builder in zip(made.bound, made.builders, strict=True):
        bound.bound_shard.model_card.vision = SimpleNamespace(weights_repo="lab/tower")
        builder._find_directory = lambda model_id: seeing if model_id == "lab/tower" else blind
    image = picture("red")
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    try:
        made.start()
        options = {"max_output_tokens": 8, "enable_thinking": False, "chat_template_messages": messages}
        made.submit("t", "What?", images=[image], **options)
        found = text(made.run(0, ended("t")), "t")
    finally:
        made.close()
    assert found == text_about(seeing, made.params("", images=[image], **options), 8)
