"""The page's files and routes, without a browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from exo_kimi.page.cluster_state import ClusterPicture, engine_state
from exo_kimi.page.events import cluster_events
from exo_kimi.page.files import page_files
from exo_kimi.planner.plan import Plan
from exo_kimi.runtime.requests import EngineSnapshot, ExpertHealth, StageHealth

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FOUNDING = {
    "cluster": "m3-ultra-512, m2-ultra-192",
    "model": "kimi-k2-thinking",
    "recipe": "q34+q6",
    "raise_limits": True,
}


def test_all_files_together_are_small_and_have_nothing_inline() -> None:
    files = page_files()
    assert sum(len(file.data) for file in files.values()) < 300_000
    index = files["index.html"].data.decode()
    assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=", index)
    for path, file in files.items():
        if path.endswith(".js"):
            assert not re.search(
                rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.data
            ), path
        assert not re.search(rb"(?:src|href|import|from|fetch|url)\W{0,3}['\"(]https?://", file.data), path


async def test_a_browser_gets_the_page_and_curl_a_line(
    client_of: Callable[..., httpx.AsyncClient], saying: Callable[..., Any]
) -> None:
    client = client_of(saying(), api_key="sesame")
    page = await client.get("/", headers=BROWSER)
    assert page.status_code == 200 and "<!doctype html>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (await client.get("/")).text == "exo-kimi is running"
    again = await client.get("/", headers={**BROWSER, "if-none-match": page.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    script = await client.get("/page/main.js")
    assert script.status_code == 200 and script.headers["content-type"].startswith("text/javascript")
    assert (await client.get("/page/words/ja.js")).status_code == 200
    assert (await client.get("/page/none.js")).status_code == 404
    assert (await client.get("/v1/page")).status_code == 401
    about = (await client.get("/v1/page", headers={"authorization": "Bearer sesame"})).json()
    assert about["views"] == ["chat", "cluster", "planner"] and about["context"] == 4096


async def test_without_the_page_a_browser_gets_the_line(
    client_of: Callable[..., httpx.AsyncClient], saying: Callable[..., Any]
) -> None:
    client = client_of(saying(), ui=False)
    assert (await client.get("/", headers=BROWSER)).text == "exo-kimi is running"
    assert (await client.get("/page/main.js")).status_code == 404


async def test_a_plan_is_the_planner_s_and_reads_no_file(
    client_of: Callable[..., httpx.AsyncClient], saying: Callable[..., Any]
) -> None:
    client = client_of(saying())
    made = (await client.post("/v1/plan", json=FOUNDING)).json()
    plan = Plan.from_json(made["plan_json"])
    assert json.loads(made["plan_json"]) == made["plan"] and plan.split in made["svg"].replace(" | ", ",")
    assert "--recipe q34+q6" in made["command"] and made["summary"].startswith("kimi-k2-thinking")
    choices = (await client.get("/v1/plan/choices")).json()
    assert {"name": "m3-ultra", "memory_gib": [96, 256, 512]} in choices["machines"] and "q34+q6" in choices["recipes"]
    for change, words in (
        ({"cluster": "/etc/passwd.toml"}, "names a file"),
        ({"recipe": "../x.toml"}, "names a file"),
        ({"recipe": "nonsense"}, "unknown recipe"),
        ({"model": "gpt"}, "unknown model"),
        ({"cluster": "m3-ultra-96"}, "does not fit"),
        ({"context": 0}, "context"),
        ({"context": "many"}, "context"),
        ({"surprise": 1}, "surprise"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "ssd_bytes_per_s": 0}, "ssd_bytes_per_s"),
        ({"split": "1,2"}, "61 layers"),
    ):
        refused = await client.post("/v1/plan", json={**FOUNDING, **change})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"], change


async def test_a_plan_reads_experts_from_disk_where_it_is_asked_to(
    client_of: Callable[..., httpx.AsyncClient], saying: Callable[..., Any]
) -> None:
    client = client_of(saying())
    small = {"cluster": "m4-max-128", "model": "kimi-k2.6", "recipe": "q34+q6"}
    refused = await client.post("/v1/plan", json=small)
    assert refused.status_code == 400 and "does not fit" in refused.json()["error"]["message"]
    made = [
        (await client.post("/v1/plan", json={**small, "stream": True, **more})).json()
        for more in ({}, {"ssd_bytes_per_s": 3e9})
    ]
    slots = [each["plan"]["stages"][0]["expert_slots"] for each in made]
    assert 8 < slots[0] < 384
    assert made[0]["command"].endswith("--stream --explain -o plan.json") and "--ssd" not in made[0]["command"]
    assert "--ssd 3GB/s --stream" in made[1]["command"]
    speeds = [Plan.from_json(each["plan_json"]).prediction.decode_tokens_per_s for each in made]
    assert speeds[1] < speeds[0]
    measured = """
        version = 1
        source = "chats"
        policy = "lru"
        experts = 384
        chosen = 8
        tokens = 9000
        slots = [8, 56, 384]
        low = [0.3, 0.7, 1]
        hits = [0.4, 0.8, 1]
        high = [0.5, 0.9, 1]
    """
    own = (await client.post("/v1/plan", json={**small, "stream": True, "hits": measured})).json()
    assert "--hits hits.toml --stream" in own["command"] and "chats, lru, 9000 tokens" in own["text"]
    assert Plan.from_json(own["plan_json"]).prediction.decode_tokens_per_s > speeds[0]
    for wrong, told in (("x =", "no TOML"), ("version = 1", "hit rates of another version")):
        answer = await client.post("/v1/plan", json={**small, "stream": True, "hits": wrong})
        assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def state(**changes: Any) -> ClusterPicture:
    empty: dict[str, Any] = {
        "kind": "exo-kimi",
        "time_s": 0.0,
        "ready": True,
        "reason": None,
        "model": "m",
        "version": "1",
        "context": 1,
        "stages": [],
        "requests": [],
        "totals": None,
        "prediction": None,
        "events": [],
    }
    return ClusterPicture(**{**empty, **changes})


def test_a_stage_whose_experts_are_on_disk_tells_how_many_were_in_memory() -> None:
    experts = ExpertHealth(
        slots=4, slot_bytes=4, hits=30, misses=10, evictions=6, read_bytes=70, read_s=0.1, stall_s=0.1, failed_reads=0
    )
    stage = StageHealth(stage=0, address="a", state="warming", start_layer=0, end_layer=4, experts=experts)
    look = EngineSnapshot(
        ready=False, stages=(stage,), requests=(), context=1, kv_capacity_tokens=1, kv_reserved_tokens=0
    )
    (view,) = engine_state(look, model="m", version="1", reason="it warms up", plan=None).stages
    assert (view.state, view.experts_held, view.experts_asked, view.experts_read_bytes) == ("warming", 30, 40, 70)


async def test_states_are_sent_when_they_change_and_in_a_silence() -> None:
    looks = 0

    async def look() -> ClusterPicture:
        nonlocal looks
        looks += 1
        return state(time_s=float(looks), context=1 if looks < 4 else 2)

    response = cluster_events(look, interval_s=0.01, silence_s=0.3)
    seen: list[tuple[float, int]] = []
    async with asyncio.timeout(20):
        async for text in response.body_iterator:
            assert isinstance(text, str) and text.startswith("event: state\ndata: ") and text.endswith("\n\n")
            sent = json.loads(text.removeprefix("event: state\ndata: "))
            seen.append((sent["time_s"], sent["context"]))
            if len(seen) == 3:
                break
    assert [context for _, context in seen] == [1, 2, 2]
    assert seen[0][0] == 1 and seen[1][0] == 4 and seen[2][0] > 6, "an unchanged state was sent at once"


@pytest.mark.parametrize("plan", [None, FOUNDING], ids=["without a plan", "with one"])
async def test_the_stream_tells_stages_requests_and_the_plan(
    live: Callable[..., Any], saying: Callable[..., Any], plan: Any, client_of: Callable[..., httpx.AsyncClient]
) -> None:
    made = None
    if plan is not None:
        answer = (await client_of(saying()).post("/v1/plan", json=plan)).json()
        made = Plan.from_json(answer["plan_json"])
    url = live(saying(), plan=made).url
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("GET", f"{url}/v1/cluster/events", timeout=10) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                break
    told = ClusterPicture.model_validate_json(line.removeprefix("data: "))
    assert (
        [stage.state for stage in told.stages] == ["ready", "ready"] and told.ready and told.kv_capacity_tokens == 8192
    )
    if made is None:
        assert told.prediction is None and told.stages[0].plan is None
    else:
        assert told.prediction is not None and told.stages[0].plan is not None
        assert told.stages[0].plan.headroom_bytes == made.stages[0].headroom_bytes
        assert made.stages[0].machine in told.stages[0].name
