"""/health, /metrics and the progress bars tell what the engine's snapshot says."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from exo_kimi.serve.progress import show_progress, wanted_bars

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "exo-kimi.json"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_health_is_200_only_when_every_stage_is_ready(saying, client_of):
    async with client_of(saying()) as client:
        response = await client.get("/health")
    assert response.status_code == 200
    report = response.json()
    assert (report["status"], report["reason"], len(report["stages"])) == ("ok", None, 2)
    assert report["stages"][1]["silent_s"] == 0.5
    assert report["stages"][0]["experts"] is None
    assert (report["stages"][1]["experts"]["hits"], report["stages"][1]["experts"]["read_s"]) == (7, 0.25)


async def test_health_names_the_stage_at_fault_and_why(saying, client_of):
    for state, words in (
        ("dead", "stage 1 is dead: exit code 137"),
        ("stalled", "stage 1 has been silent for 0.5 s"),
        ("loading", "stage 1 is loading (50 of 100 bytes)"),
        ("starting", "stage 1 is starting"),
    ):
        async with client_of(saying(stage_states=("ready", state), ready=False)) as client:
            response = await client.get("/health")
        assert response.status_code == 503
        assert response.json()["reason"] == words
        assert response.json()["stages"][1]["loading_progress"] == 0.5
    async with client_of(saying(ready=False)) as client:
        assert (await client.get("/health")).status_code == 503


async def test_metrics_count_what_happened_and_parse(saying, client_of):
    engine = saying(stage_states=("ready", "loading"))
    async with client_of(engine) as client:
        await client.post(CHAT, json=ASK)
        await client.post(CHAT, json={**ASK, "temperature": 9})
        await client.get("/whatever/../" + "x" * 50)
        engine.open.add("abc")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["exo_kimi_http_requests_total", "/v1/chat/completions", "200"] == 1
    assert samples["exo_kimi_http_requests_total", "/v1/chat/completions", "400"] == 1
    assert samples["exo_kimi_http_requests_total", "404", "other"] == 1
    assert samples["exo_kimi_requests_total",] == 1
    assert samples["exo_kimi_preemptions_total",] == 3
    for name, value in (
        ("hits_total", 7),
        ("misses_total", 5),
        ("evictions_total", 4),
        ("read_bytes_total", 500),
        ("read_seconds_total", 0.25),
        ("stall_seconds_total", 0.125),
        ("failed_reads_total", 1),
        ("slots", 12),
        ("slot_bytes", 1200),
        ("read_bytes_per_second", 2000),
    ):
        assert samples[f"exo_kimi_expert_{name}", "1"] == value
        assert (f"exo_kimi_expert_{name}", "0") not in samples
    assert samples["exo_kimi_draft_tokens_total",] == 9
    assert samples["exo_kimi_draft_tokens_accepted_total",] == 7
    assert samples["exo_kimi_decode_bytes_total",] == 2e12
    assert samples["exo_kimi_kv_reserved_tokens",] == 1024
    assert samples["exo_kimi_stage_state", "1", "loading"] == 1
    assert samples["exo_kimi_stage_state", "1", "ready"] == 0
    assert samples["exo_kimi_stage_loaded_bytes", "1"] == 50
    assert samples["exo_kimi_requests_in_flight", "prefill"] == 1
    assert samples["exo_kimi_prefill_done_tokens", "abc"] == 4
    assert samples["exo_kimi_time_to_first_token_seconds_count",] == 1
    assert samples["exo_kimi_api_generations_total", "ok"] == 1
    assert samples["exo_kimi_request_queue_time_seconds_count",] == 1
    assert samples["exo_kimi_inter_token_latency_seconds_count",] > 0


async def test_every_metric_of_the_dashboard_exists(saying, client_of):
    async with client_of(saying()) as client:
        await client.post(CHAT, json=ASK)
        text = (await client.get("/metrics")).text
    known = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for expression in asked for name in re.findall(r"exo_kimi_\w+", expression)}
    assert len(named) > 20
    assert named - known == set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


async def test_two_apps_do_not_share_metrics(saying, client_of):
    async with client_of(saying()) as one, client_of(saying()) as other:
        await one.post(CHAT, json=ASK)
        text = (await other.get("/metrics")).text
    assert "exo_kimi_time_to_first_token_seconds_count 0.0" in text


async def test_progress_shows_loading_stages_and_ends_clean(saying):
    engine = saying(stage_states=("ready", "loading"))
    assert wanted_bars(engine.snapshot()) == {"stage 1 loading": (0.5, "50 B of 100 B")}
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100)
        task = asyncio.create_task(show_progress(engine, console))
        await asyncio.sleep(0.4)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert ("stage 1 loading" in screen.getvalue()) == terminal
