"""On the real exo v1.0.71, two nodes on loopback: our client with exo's own engine, and our engine inside its runners.

How to run (Linux; about two minutes):

    EXO_71_SRC=CHECKOUT EXO_71_PYTHON=VENV/bin/python python -m pytest tests/plugin/runner/test_real_exo_71.py -m exo

EXO_71_SRC is a checkout of exo v1.0.71. EXO_71_PYTHON (else EXO_PYTHON) is a Python 3.13 with its locked packages, mlx[cpu]
0.31.2, mlx-lm of exo's fork at c7010341, mlx-vlm 0.4.4 without its dependencies, eclipse-zenoh, and what exo-kimi needs. Its Rust
module is `standin71/exo_pyo3_bindings.py`, over the stand-in of control/test_real_exo.py.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.plugin.control.apply import Applied, apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.texts import status_text
from exo_kimi.plugin.control.watch import Deadlines
from tests.plugin.seeing import picture, text_about

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

MODEL, SEEING = "lab/kimi-k2-tiny", "lab/kimi-k2-seeing"
PROMPTS = ("Tell me about the sea.", "How many layers has a cake?")
LONG = "river"
TOKENS, CONTEXT = 24, 3000
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)


@pytest.fixture(scope="module")
def exo(exo_71: Any) -> Any:
    if isinstance(exo_71, str):
        pytest.skip(exo_71)
    return exo_71


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    prepare(tiny, folder, model_id=MODEL)
    seeing = tmp_path_factory.mktemp("seeing") / "kimi"
    prepare(make_tiny(seeing, layout="bf16", dtype="F32", vision=True, template="k25"), folder, model_id=SEEING)
    return folder


@pytest.fixture(scope="module")
def theirs(exo: Any, real_exo: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with exo's own engine."""
    with real_exo.exo_cluster(exo, tmp_path_factory.mktemp("theirs"), models) as running:
        yield running


def ask(url: str, prompt: str, *, tokens: int = TOKENS, **options: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | options, timeout=120, trust_env=False).json()
    return str(reply["choices"][0]["message"]["content"])


def place(client: ExoClient, tiny: Path, *split: int, our_engine: bool = False) -> Applied:
    plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=split, our_engine=our_engine).plan
    return apply_plan(client, plan, replace=True, deadlines=DEADLINES)


def test_our_client_places_splits_on_exos_own_engine(theirs: Any, tiny: Path) -> None:
    with ExoClient(theirs.url) as client:
        assert "exo 1.0.x" in status_text(client.state(), where=theirs.url)
        answers = []
        for split in ((7,), (5, 2), (2, 5)):
            place(client, tiny, *split)
            answers.append([ask(theirs.url, prompt) for prompt in PROMPTS])
        assert answers[0] == answers[1] == answers[2] and all(answers[0])


@pytest.fixture(scope="module")
def ours(exo: Any, real_exo: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with our engine, and room for CONTEXT tokens in a sequence."""
    if reason := exo.cannot_import_us():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("ours")
    extra = {"EXO_KIMI_CONTEXT": str(CONTEXT), "EXO_KIMI_KV_BYTES": "1GB", "EXO_KIMI_PREFIX_CACHE_BYTES": "0"}
    with real_exo.exo_cluster(exo, root, models, plugin=real_exo.BIND_US, extra=extra) as running:
        yield running


@pytest.fixture(scope="module")
def alone(tiny: Path, exo_shapes: Any) -> dict[str, str]:
    """What the model answers in one process, without exo, by prompt."""
    return {prompt: exo_shapes.greedy_text(tiny, prompt, TOKENS) for prompt in PROMPTS}


@pytest.mark.parametrize("split", [(5, 2), (2, 5), (7,)])
def test_our_engine_answers_as_one_process_does(
    ours: Any, tiny: Path, alone: dict[str, str], split: tuple[int, ...]
) -> None:
    with ExoClient(ours.url) as client:
        place(client, tiny, *split, our_engine=True)
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda prompt: found.update({prompt: ask(ours.url, prompt)}), args=(prompt,))
        for prompt in PROMPTS
    ]
    for thread in threads:  # two requests at once
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone
    cut = split[0]
    said = re.findall(r"rank (\d of \d: layers \d:\d)", "".join(node.log.read_text() for node in ours.nodes))
    assert f"0 of {len(split)}: layers 0:{cut}" in said


def test_a_picture_is_answered_as_one_process_answers(ours: Any, models: Path, exo_shapes: Any) -> None:
    directory = models / SEEING.replace("/", "--")
    with ExoClient(ours.url) as client:
        plan = exo_plan(client.state(), directory, model_id=SEEING, context=4096, split=(5, 2), our_engine=True).plan
        assert apply_plan(client, plan, replace=True, deadlines=DEADLINES).answer is not None
    for color in ("red", "blue"):
        url = {"url": f"data:image/png;base64,{picture(color)}"}
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
        messages = [{"role": "user", "content": parts}]
        found = ask(ours.url, "", tokens=8, model=SEEING, messages=messages, enable_thinking=False)
        shown = [{"role": "user", "content": [parts[0], {"type": "image"}]}]
        params = exo_shapes.task_params(
            "", images=[picture(color)], chat_template_messages=shown, enable_thinking=False, max_output_tokens=8
        )
        assert found == text_about(directory, params, 8), color


def stream(url: str, prompt: str, *, tokens: int, stop_after: int | None = None) -> list[str]:
    """The lines of a streamed answer; the connection is closed after `stop_after` of them."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    lines: list[str] = []
    url = f"{url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120, trust_env=False) as reply:
        for line in reply.iter_lines():
            lines += [line] if line.startswith("data: {") else []
            if len(lines) == stop_after:
                break
    return lines


def held(cluster: Any) -> list[str]:
    """What the ranks held, whenever that changed."""
    return re.findall(r"the ranks hold (.*?) of caches", "".join(node.log.read_text() for node in cluster.nodes))


def test_a_stream_that_nobody_reads_any_more_frees_its_memory(ours: Any, real_exo: Any, tiny: Path) -> None:
    with ExoClient(ours.url) as client:
        place(client, tiny, 5, 2, our_engine=True)
    time.sleep(2)  # what `apply` asked is told by the heartbeats
    before = len(held(ours))
    assert len(stream(ours.url, LONG, tokens=2900, stop_after=100)) == 100
    real_exo.wait_until(lambda: "0 sequences, 0 bytes" in held(ours)[before:], 10, ours.tail)


def test_a_killed_runner_is_an_error_and_placing_again_works(ours: Any, tiny: Path, alone: dict[str, str]) -> None:
    with ExoClient(ours.url) as client:
        place(client, tiny, 5, 2, our_engine=True)
        threading.Timer(2.0, os.kill, (ours.nodes[1].runner(), signal.SIGKILL)).start()
        begun = time.monotonic()
        lines = stream(ours.url, LONG, tokens=2900)
        assert len(lines) > 10 and "error" in lines[-1]
        assert time.monotonic() - begun < 30
        place(client, tiny, 2, 5, our_engine=True)
    assert ask(ours.url, PROMPTS[0]) == alone[PROMPTS[0]]


def test_the_context_that_the_node_was_started_with_is_the_limit(ours: Any, tiny: Path) -> None:
    with ExoClient(ours.url) as client:
        place(client, tiny, 5, 2, our_engine=True)
    (line,) = stream(ours.url, "a", tokens=CONTEXT)
    assert "error" in line and str(CONTEXT) in line
