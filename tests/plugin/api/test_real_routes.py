"""On real exo, two nodes on loopback with our engine inside: every route of exo's API, streamed and not (b5375f8ce and v1.0.71).

EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python -m pytest tests/plugin/api/test_real_routes.py -m exo
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

MODEL, CONTEXT = "lab/kimi-k2-tiny", 512
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)
PICTURE = "data:image/png;base64,iVBORw0KGgo="


def bodies(content: Any, tokens: int) -> dict[str, dict[str, Any]]:
    """A request with this text on every route that generates."""
    asked = [{"role": "user", "content": content}]
    options = {"num_predict": tokens, "temperature": 0.0}
    return {
        "/v1/chat/completions": {"messages": asked, "max_tokens": tokens, "temperature": 0},
        "/bench/chat/completions": {"messages": asked, "max_tokens": tokens, "temperature": 0},
        "/v1/messages": {"messages": asked, "max_tokens": tokens, "temperature": 0},
        "/v1/responses": {"input": content, "max_output_tokens": tokens, "temperature": 0},
        "/ollama/api/chat": {"messages": asked, "options": options},
        "/ollama/api/generate": {"prompt": content, "options": options},
    }


@pytest.fixture(scope="module", params=["exo_head", "exo_71"])
def cluster(
    request: pytest.FixtureRequest, real_exo: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Two nodes with our engine, and a plan with a context of 512 tokens placed."""
    exo = request.getfixturevalue(request.param)
    if isinstance(exo, str) or (reason := exo.cannot_import_us()):
        pytest.skip(exo if isinstance(exo, str) else str(reason))
    models = tmp_path_factory.mktemp("models")
    prepare(tiny, models, model_id=MODEL)
    with real_exo.exo_cluster(exo, tmp_path_factory.mktemp("exo"), models, plugin=real_exo.BIND_US) as running:
        with ExoClient(running.url) as client:
            plan = exo_plan(client.state(), tiny, model_id=MODEL, context=CONTEXT, split=(4, 3), our_engine=True).plan
            apply_plan(client, plan, model_id=MODEL, our_engine=True, deadlines=DEADLINES)
        yield running


def ask(url: str, route: str, body: dict[str, Any], *, stream: bool) -> tuple[int, str]:
    asked = {"model": MODEL, "stream": stream, **body}
    answer = httpx.post(f"{url}{route}", json=asked, timeout=200, trust_env=False)
    return answer.status_code, answer.text


def ask_all(url: str, content: Any, tokens: int) -> dict[str, tuple[int, str]]:
    """Every route, streamed and not, at once."""
    wanted = [(route, body, stream) for route, body in bodies(content, tokens).items() for stream in (True, False)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = [pool.submit(ask, url, route, body, stream=stream) for route, body, stream in wanted]
        return {
            f"{r} {'stream' if s else 'whole'}": each.result() for (r, _, s), each in zip(wanted, found, strict=True)
        }


def test_a_placed_model_tells_the_plans_context(cluster: Any) -> None:
    for node in cluster.nodes:
        listed = httpx.get(f"{node.url}/v1/models", timeout=30, trust_env=False).json()["data"]
        (card,) = (each for each in listed if each["id"] == MODEL)
        assert (card["context_length"], card["capabilities"], card["family"]) == (CONTEXT, ["text"], "kimi")
        assert f"a context of {CONTEXT} tokens" in node.log.read_text(errors="replace")


def test_a_million_tokens_are_answered_on_every_route(cluster: Any) -> None:
    for key, (status, text) in ask_all(cluster.url, "river", 10**6).items():
        assert status == 200 and len(text) > 500, (key, text[:300])
        ends = ('"length"', '"max_tokens"', '"completed"', '"stop"', '"end_turn"')  # most end by themselves
        assert any(word in text for word in ends), (key, text[-300:])


def test_no_limit_is_no_limit(cluster: Any) -> None:
    for tokens in (0, -1):
        route, body = "/ollama/api/chat", bodies("river", tokens)["/ollama/api/chat"]
        status, text = ask(cluster.url, route, body, stream=False)
        assert status == 200 and json.loads(text)["eval_count"] > 16


def test_a_prompt_over_the_context_is_words_and_a_status_on_every_route(cluster: Any) -> None:
    for key, (status, text) in ask_all(cluster.url, "a " * 600, 16).items():
        assert status == 400 and "the context holds 512" in text, (key, text[:300])


def test_a_picture_is_words_and_a_status(cluster: Any) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    for stream in (True, False):
        body = bodies(parts, 8)["/v1/chat/completions"]
        status, text = ask(cluster.url, "/v1/chat/completions", body, stream=stream)
        assert status == 400 and "images" in text


def test_benches_repeat_at_the_same_speed_and_tell_hits(cluster: Any) -> None:
    """Hits would make later runs hundreds of times faster. The machine may be busy: the runs are printed, and bounded loosely."""
    body = bodies("The same long words again and again. " * 20, 8)["/bench/chat/completions"]

    def run(**options: Any) -> dict[str, Any]:
        status, text = ask(cluster.url, "/bench/chat/completions", {**body, **options}, stream=False)
        assert status == 200, text
        stats: dict[str, Any] = json.loads(text)["generation_stats"]
        assert stats["generation_tokens"] == 8
        return stats

    run()
    speeds = [run() for _ in range(6)]
    assert {each["prefix_cache_hit"] for each in speeds} == {"none"}
    first, last = (statistics.median(each["prompt_tps"] for each in part) for part in (speeds[:3], speeds[3:]))
    runs = [round(each["prompt_tps"]) for each in speeds]
    print(f"prompt tokens per second: first half {first:.0f}, second half {last:.0f}; {runs}")
    assert 0.3 < last / first < 3
    hits = [run(use_prefix_cache=True) for _ in range(2)]
    assert hits[0]["prefix_cache_hit"] != "exact" and hits[1]["prefix_cache_hit"] == "exact"  # the template is shared
    assert hits[1]["prompt_tps"] < 3 * first


def test_a_killed_runner_is_words_on_every_route_and_serves_again(cluster: Any, real_exo: Any) -> None:
    body = {"model": MODEL, "stream": True, **bodies("river", 10**6)["/v1/messages"]}
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(ask_all, cluster.url, "river", 10**6)
        with httpx.stream("POST", f"{cluster.url}/v1/messages", json=body, timeout=200, trust_env=False) as reply:
            lines: list[str] = []
            for line in reply.iter_lines():
                lines.append(line)
                if len(lines) == 20:  # it is under way
                    os.kill(cluster.nodes[1].runner(), signal.SIGKILL)
        found = others.result()
    assert "event: error" in lines and "message_stop" not in lines[-3:], lines[-5:]
    failed = {key: each for key, each in found.items() if "Runner" in each[1] or "stage" in each[1]}
    print(
        f"{len(failed)} of {len(found)} were in flight and failed with words; the others came later and were answered"
    )
    for key, (status, text) in found.items():
        if key in failed:
            assert status == 503 or (key.endswith("stream") and status == 200), (key, status)
        else:
            assert status == 200 and len(text) > 500, (key, status, text[-300:])
    plain = bodies("river", 4)["/v1/chat/completions"]
    began_s = time.monotonic()
    real_exo.wait_until(
        lambda: ask(cluster.url, "/v1/chat/completions", plain, stream=False)[0] == 200, 90, cluster.tail
    )
    print(f"served again after {time.monotonic() - began_s:.1f} s")
