"""What one `exo-kimi serve` reads of a checkpoint: every header and config.json once, with a plan too."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import kv_bytes_per_token
from exo_kimi.checkpoint import index
from exo_kimi.checkpoint.adapters.manifest import resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.text_files import read_config
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ConfigError, PlanInfeasibleError, UsageError
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.plan import Plan
from exo_kimi.runtime.cluster.capacity import StageMemory, kv_capacity
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.serve import launch
from exo_kimi.serve.drafts import draft_need, find_head
from exo_kimi.serve.launch import ServeOptions, serve
from tests.runtime.adapters import write_random

opened: list[Path] = []
watching = False


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file that this process opens; a hook cannot be taken away again, so it is told when to listen."""
    if watching and event == "open" and isinstance(arguments[0], str | bytes | Path):
        opened.append(Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def listen() -> None:
    sys.addaudithook(hear)


@pytest.mark.parametrize("planned", [True, False])
def test_headers_and_config_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    """In this process, until the stages are ready; each stage process reads its own once more."""
    global watching
    directory = make_tiny(tmp_path / "tiny", shards=3)
    plan = tmp_path / "plan.json"
    plan_answer(directory=directory, cluster="2x m1-max-64", context=256).plan.save(plan)
    headers: Counter[str] = Counter()
    read_header = index.read_header

    def counted(path: Path) -> Any:
        headers[path.name] += 1
        return read_header(path)

    async def start(factory: Callable[[], Awaitable[Any]]) -> None:
        served = await factory()
        await asyncio.wait_for(served.engine.wait_ready(), 60)
        kept_tokens = served.engine.snapshot().kv_capacity_tokens
        assert (kept_tokens <= 256) == planned, (
            "a plan's room is kept whatever is free, and all that is free is taken without"
        )
        await served.engine.close()

    monkeypatch.setattr(index, "read_header", counted)
    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(start(factory)))
    watching = True
    try:
        serve(ServeOptions(directory=directory, context=256, dtype="float32", plan=plan if planned else None))
    finally:
        watching = False
    times = Counter(path.name for path in opened if path.parent == directory)
    opened.clear()
    assert headers == {f"model-0000{number}-of-00003.safetensors": 1 for number in (1, 2, 3)}
    assert times["config.json"] == 1
    assert times["model.safetensors.index.json"] == 1


def test_a_plan_over_a_limit_is_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny")
    plan = plan_answer(directory=directory, cluster="2x m1-max-64", context=256).plan
    path = tmp_path / "plan.json"
    replace(plan, stages=(replace(plan.stages[0], headroom_bytes=-3), *plan.stages[1:])).save(path)
    started: list[object] = []
    monkeypatch.setattr(launch, "run", lambda factory, **_: started.append(factory))
    options = ServeOptions(directory=directory, dtype="float32", plan=path)
    with pytest.raises(PlanInfeasibleError, match=r"short by(.|\n)*\(3 bytes\)(.|\n)*plan.json(.|\n)*--force"):
        serve(options)
    assert not started
    serve(replace(options, force=True))
    assert started


# Every option of `serve`, with a value that bears on memory or none; REFUSED ones contradict a plan or ask for more than it.
FOLLOWED: dict[str, Any] = {
    "host": "127.0.0.2",
    "port": 1,
    "force": True,
    "api_key": "secret",
    "allowed_host": ("studio.local",),
    "context": 128,
    "model_id": "kimi",
    "served_model_name": ("kimi", "k2"),
    "any_model": True,
    "strict_api": True,
    "cors_origin": ("https://app.example",),
    "vision": None,
    "no_vision": True,
    "fetch_images": True,
    "dtype": "float32",
    "kv_bytes": 4096,
    "kv_bits": 8,
    "expert_cache": 1 << 30,
    "expert_policy": "slru",
    "expert_prefetch": "off",
    "expert_reads": "direct",
    "expert_profile": None,
    "trace_experts": None,
    "prefill_chunk": 4096,
    "queue_limit": 1000,
    "survive": 1.0,
    "no_ui": True,
    "stall_deadline": 90.0,
    "speculate": 8,
    "draft": "a head of the tiny Kimi",
    "adapter": "an adapter of the tiny Kimi",
    "draft_tokens": 3,
    "link": "jaccl",
    "prefix_cache_bytes": 1 << 40,
    "prefix_disk_bytes": 1 << 30,
    "prefix_dir": None,
    "key_file": None,
    "stage": (),
    "stages": 2,
}
REFUSED: dict[str, Any] = {"split": "4,3", "context": 512, "kv_bytes": 1 << 40}


@pytest.fixture(scope="module")
def planned_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("planned") / "tiny", config={"kv_lora_rank": 32, "qk_rope_head_dim": 32})


@pytest.fixture
def planned(planned_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`planned(**options)` serves a tiny Kimi by a plan, and gives the plan and the KV bytes that each stage would take."""
    directory = planned_tiny
    answer = plan_answer(directory=directory, cluster="2x m1-max-64", context=256, split="4,3", concurrency=3)
    answer.plan.save(tmp_path / "plan.json")
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr(launch, "StageCluster", lambda plan, options: started.append((plan, options)) or object())
    monkeypatch.setattr(launch, "Engine", lambda *_, **__: (_ for _ in ()).throw(EOFError))

    async def factory_only(factory: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(EOFError):
            await factory()

    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(factory_only(factory)))

    def start(**options: Any) -> tuple[Plan, list[int]]:
        if "draft" in options:
            options["draft"] = make_tiny_draft(tmp_path / "head", KimiConfig.from_dict(read_config(directory)))
        if "adapter" in options:
            options["adapter"] = (f"tuned={write_random(tmp_path / 'tuned', directory, seed=1)}",)
        serve(ServeOptions(directory=directory, **{"plan": tmp_path / "plan.json", **options}))
        cluster, settings = started.pop()
        element_bytes = 4 if options.get("dtype") == "float32" else 2
        stages = [
            StageMemory(
                stage=index,
                host=f"host{index}",
                free_bytes=12 << 30,
                free_scope="host",
                active_bytes=0,
                weights_bytes=stage.resident_bytes,
                kv_bytes_per_token=kv_bytes_per_token(
                    cluster.config,
                    stage.load.start_layer,
                    stage.load.end_layer,
                    bytes_per_element=element_bytes,
                    kv_bits=stage.load.kv_bits,
                ),
            )
            for index, stage in enumerate(cluster.stages)
        ]
        tokens = kv_capacity(stages, kv_bytes=settings.kv_bytes, planned_kv_bytes=settings.planned_kv_bytes).tokens
        return answer.plan, [tokens * stage.kv_bytes_per_token for stage in stages]

    return start


def test_every_option_is_tried_with_a_plan() -> None:
    assert {each.name for each in fields(ServeOptions)} - {"directory", "plan"} == set(FOLLOWED) | set(REFUSED)


@pytest.mark.parametrize("option", ["nothing", *FOLLOWED])
def test_no_option_makes_a_stage_take_more_kv_than_its_plan_says(planned: Any, option: str) -> None:
    plan, taken = planned(**({} if option == "nothing" else {option: FOLLOWED[option]}))
    for stage, bytes_ in zip(plan.stages, taken, strict=True):
        assert 0 < bytes_ <= stage.kv_bytes
        if option == "nothing":
            assert bytes_ == stage.kv_bytes, "and no less, for three sequences of the whole context"


@pytest.mark.parametrize("option", REFUSED)
def test_what_contradicts_a_plan_is_refused_by_name(planned: Any, option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        planned(**{option: REFUSED[option]})


def test_adapters_that_the_plan_has_no_room_for_are_refused(
    planned_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_answer(directory=planned_tiny, cluster="2x m1-max-64", context=256, split="4,3").plan
    adapter = write_random(tmp_path / "tuned", planned_tiny, seed=1)
    need_bytes = resolve_adapter(adapter, Checkpoint(planned_tiny)).bytes_within(0, 4)
    started: list[object] = []
    monkeypatch.setattr(launch, "run", lambda factory, **_: started.append(factory))
    first, *others = plan.stages
    for room_bytes in (need_bytes, need_bytes - 1):
        replace(plan, stages=(replace(first, headroom_bytes=room_bytes), *others)).save(tmp_path / "plan.json")
        options = ServeOptions(directory=planned_tiny, plan=tmp_path / "plan.json", adapter=(str(adapter),))
        if room_bytes < need_bytes:
            with pytest.raises(UsageError, match=r"no room for the adapters on stage 0(.|\n)*--adapter"):
                serve(options)
        else:
            serve(options)
    assert len(started) == 1


def test_a_head_that_the_plan_has_no_room_for_is_refused_with_the_bytes(
    planned_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: what is there is enough, one byte less is not; the stage's own caches keep what they were planned to have."""
    plan = plan_answer(directory=planned_tiny, cluster="2x m1-max-64", context=256, split="4,3").plan
    checkpoint = Checkpoint(planned_tiny)
    directory = make_tiny_draft(tmp_path / "head", checkpoint.config, own_embedding=False)
    head = find_head(directory, "auto", checkpoint)
    assert head is not None
    need = draft_need(head, checkpoint, plan, element_bytes=2, prefill_chunk=plan.workload.prefill_chunk)
    embedding = next(s for s in checkpoint.manifest(0, 1).sources if s.spec.path.endswith("embed_tokens"))
    assert need.weights_bytes == head.resident_bytes + embedding.resident_bytes
    last = plan.stages[-1]
    started: list[object] = []
    monkeypatch.setattr(launch, "run", lambda factory, **_: started.append(factory))
    for room in (need.total_bytes, need.total_bytes - 1):
        tight = replace(plan, stages=(*plan.stages[:-1], replace(last, headroom_bytes=room)))
        tight.save(tmp_path / "plan.json")
        options = ServeOptions(directory=planned_tiny, plan=tmp_path / "plan.json", draft=directory)
        if room < need.total_bytes:
            with pytest.raises(
                UsageError, match=rf"no room for the draft head(.|\n)*{need.total_bytes} bytes(.|\n)*--draft"
            ):
                serve(options)
            serve(replace(options, draft_tokens=0))
        else:
            serve(options)
        assert len(started) == (1 if room == need.total_bytes else 2)


def test_a_plan_that_was_made_with_the_head_has_room_for_it(
    planned_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No headroom is needed, and what the plan counts for features is not given to the passes."""
    directory = make_tiny_draft(tmp_path / "head", Checkpoint(planned_tiny).config, own_embedding=False)
    asked: dict[str, Any] = {"directory": planned_tiny, "cluster": "2x m1-max-64", "context": 256, "split": "4,3"}
    without, plan = plan_answer(**asked).plan, plan_answer(**asked, draft=directory).plan
    tight = replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], headroom_bytes=0)))
    tight.save(tmp_path / "plan.json")
    seen: list[Any] = []
    monkeypatch.setattr(launch, "make_plan", lambda *_, **given: seen.append(given) or make_plan(*_, **given))
    monkeypatch.setattr(launch, "run", lambda factory, **_: None)
    serve(ServeOptions(directory=planned_tiny, plan=tmp_path / "plan.json", draft=directory))
    assert seen[0]["scratch_bytes"] == min(stage.scratch_bytes for stage in without.stages)


def test_a_head_of_another_model_is_refused_before_anything_starts(planned_tiny: Path, tmp_path: Path) -> None:
    other = KimiConfig.from_dict(read_config(planned_tiny) | {"hidden_size": 128})
    with pytest.raises(ConfigError, match="another hidden_size"):
        serve(ServeOptions(directory=planned_tiny, draft=make_tiny_draft(tmp_path / "head", other)))


def test_without_a_plan_a_stage_takes_what_is_free(planned: Any) -> None:
    _, taken = planned(plan=None)
    assert min(taken) > 5 << 30


def test_a_plan_says_the_prefill_chunk_unless_an_option_does(
    planned_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_answer(directory=planned_tiny, cluster="m1-max-64", context=256, prefill_chunk=128).plan.save(tmp_path / "p")
    seen: list[Any] = []

    def engine(*_: Any, **given: Any) -> Any:
        seen.append(given["prefill_chunk"])
        raise EOFError

    async def start(factory: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(EOFError):
            await factory()

    monkeypatch.setattr(launch, "StageCluster", lambda *_: object())
    monkeypatch.setattr(launch, "Engine", engine)
    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(start(factory)))
    for option in (None, 64):
        serve(ServeOptions(directory=planned_tiny, plan=tmp_path / "p", prefill_chunk=option))
    assert seen == [128, 64]
    seen.clear()
    for option in (
        None,
        64,
    ):  # each chunk reads nearly every expert once, so they are longer where experts come from disk
        serve(ServeOptions(directory=planned_tiny, expert_cache=10**12, prefill_chunk=option))
    assert seen == [launch.STREAMING_CHUNK, 64]


def test_a_stage_streams_what_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that is too small gets slots, the other holds all; an --expert-cache goes before the plan's."""
    directory = make_tiny(tmp_path / "tiny")
    cluster = tmp_path / "cluster.toml"
    entry = '[[machine]]\nname = "{}"\nchip = "m4-max"\nmemory = "36GiB"\nssd_bytes_per_s = 5e9\n'
    asked: dict[str, Any] = {"directory": directory, "cluster": cluster, "context": 64, "reserve_bytes": 0}
    asked["prefill_chunk"] = 64
    cluster.write_text(entry.format("a") + entry.format("b"))
    whole = plan_answer(**asked, split="4,3").plan.stages
    limits = [whole[0].need_bytes, whole[1].need_bytes - 300_000]
    cluster.write_text("".join(entry.format(n) + f'limit = "{size} B"\n' for n, size in zip("ab", limits, strict=True)))
    answer = plan_answer(**asked, split="4,3", stream=True)
    plan, model = answer.plan, answer.split.question.model
    assert plan.stages[0].expert_slots is None and plan.stages[1].expert_slots is not None
    plan.save(tmp_path / "plan.json")
    found: list[tuple[int | None, ...]] = []

    async def start(factory: Callable[[], Awaitable[Any]]) -> None:
        served = await factory()
        await asyncio.wait_for(served.engine.wait_ready(), 60)
        async with asyncio.timeout(20):  # until a heartbeat has told it
            while (stages := served.engine.snapshot().stages)[1].experts is None:
                await asyncio.sleep(0.1)
        experts = [stage.experts for stage in stages]
        found.append(tuple(None if each is None else each.slots for each in experts))
        await served.engine.close()

    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(start(factory)))
    serve(ServeOptions(directory=directory, plan=tmp_path / "plan.json"))
    serve(ServeOptions(directory=directory, plan=tmp_path / "plan.json", expert_cache=10**6))
    moe = sum(size > 0 for size in model.expert_bytes[4:])
    assert found[0] == (None, plan.stages[1].expert_slots * moe)
    assert found[1][1] not in (None, found[0][1])
