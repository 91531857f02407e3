"""`exo-kimi ui`: the page without a model, and an exo cluster in it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx

from exo_kimi.client.ui import create_ui_app
from exo_kimi.plugin.control.http import ExoClient


def app_client(client: ExoClient | None, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_ui_app(client, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_the_planner_is_there_without_a_model() -> None:
    client = app_client(None, hosts=frozenset({"localhost"}))
    assert "<!doctype html>" in (await client.get("/", headers={"accept": "text/html"})).text
    assert (await client.get("/page/planner.js")).status_code == 200
    assert (await client.get("/v1/page")).json()["views"] == ["planner"]
    made = await client.post("/v1/plan", json={"cluster": "2x m3-ultra-512", "model": "kimi-k2-thinking"})
    assert made.status_code == 200 and made.json()["svg"].startswith("<svg")
    refused = await client.post("/v1/plan", json={"cluster": "m4-32", "model": "kimi-k2-thinking"})
    assert refused.status_code == 400 and "does not fit" in refused.json()["error"]["message"]
    assert (await client.get("/v1/cluster/events")).status_code == 404
    rebound = await client.get("/v1/page", headers={"host": "evil.example"})
    assert rebound.status_code == 403 and "evil.example" in rebound.json()["error"]["message"]


def test_the_command_says_in_one_line_what_is_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "exo_kimi", "ui", "--exo", "http://127.0.0.1:9", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr and "127.0.0.1:9" in done.stderr


def test_it_needs_no_mlx() -> None:
    look = "import exo_kimi.client.ui, sys; print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')])"
    assert subprocess.check_output([sys.executable, "-c", look], text=True).strip() == "[]"
