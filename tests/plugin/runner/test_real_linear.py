"""A tiny Kimi Linear in the real exo, whose own engine does not know the model: two nodes on loopback, with our engine.

How to run (Linux; about two minutes): as test_real_exo.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines

pytestmark = [pytest.mark.exo, pytest.mark.timeout(400)]

MODEL = "lab/kimi-linear-tiny"
PROMPTS = ("Tell me about the sea.", "How many layers has a cake?")
TOKENS = 16
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("linear") / "kimi", family="linear", layout="bf16", dtype="F32")


@pytest.fixture(scope="module")
def cluster(exo_head: Any, real_exo: Any, linear: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    models = tmp_path_factory.mktemp("models")
    prepare(linear, models, model_id=MODEL)
    root = tmp_path_factory.mktemp("exo")
    with real_exo.exo_cluster(exo_head, root, models, plugin=real_exo.BIND_US) as running:
        yield running


def ask(url: str, prompt: str) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    return dict(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json())


@pytest.mark.parametrize("split", [(3, 4), (5, 2)])
def test_a_split_answers_as_one_process_does(
    cluster: Any, linear: Path, exo_shapes: Any, split: tuple[int, int]
) -> None:
    """A rank of states alone beside one of both kinds, and the other way round; the same prompt again begins in what it left."""
    with ExoClient(cluster.url) as client:
        plan = exo_plan(client.state(), linear, model_id=MODEL, context=4096, split=split, our_engine=True).plan
        apply_plan(client, plan, model_id=MODEL, replace=True, our_engine=True, deadlines=DEADLINES)
    expected = {prompt: exo_shapes.greedy_text(linear, prompt, TOKENS) for prompt in PROMPTS}
    for _ in range(2):
        found = {prompt: str(ask(cluster.url, prompt)["choices"][0]["message"]["content"]) for prompt in PROMPTS}
        assert found == expected
