"""On real legacy exo, two nodes on loopback, split 5/2 by plan: what each loads, what they answer, what fails and how.

How to run (Linux; about three minutes):

    EXO_LEGACY_SRC=CHECKOUT EXO_LEGACY_PYTHON=VENV/bin/python python -m pytest tests/plugin/legacy/test_real_exo.py -m exo

EXO_LEGACY_SRC is a checkout of exo v0.0.15-alpha. EXO_LEGACY_PYTHON is a Python 3.12 with exo-kimi's own dependencies and, of
exo's: aiohttp 3.10.11, aiohttp_cors 0.7.0, aiofiles 24.1.0, grpcio 1.71 with protobuf 5, nvidia-ml-py, opencv-python-headless,
pillow, psutil, requests, scapy, tqdm, transformers 5, uvloop 0.21, and for Linux tinygrad 0.10.2; none of its pins of numpy, mlx
and mlx-lm. Nodes listen on 127.1.x.1 and 127.1.x.2 only (x from the process id), ports 50651 and 52611.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

PROMPTS = ("Tell me about the sea.", "How many layers has a cake?", "今天天气怎么样?")
TOKENS = 16
MODEL = "kimi"


@pytest.fixture(scope="module", autouse=True)
def _legacy_exo(real_legacy: Any) -> None:
    if reason := real_legacy.missing():
        pytest.skip(reason)


@pytest.fixture
def start(real_legacy: Any, legacy_plan: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts nodes 1 and 2 with a checkpoint each."""
    with real_legacy.cluster(tmp_path) as cluster:

        def started(*models: Path, preload: bool = False, extra: tuple[str, ...] = ()) -> Any:
            for number, model in enumerate(models, 1):
                start_node(cluster, real_legacy, legacy_plan, number, model, preload=preload, extra=extra)
            cluster.wait_seen()
            return cluster

        yield started


def start_node(cluster: Any, real_legacy: Any, plan: Path, number: int, model: Path, **options: Any) -> Any:
    """With `exo-kimi exo-legacy`."""
    before = ["-m", "exo_kimi", "exo-legacy", "--plan", str(plan), "--model", str(model), "--name", MODEL]
    before += ["--api-host", f"{real_legacy.NETWORK}.{number}"]
    before += ["--preload"] if options.get("preload") else []
    return cluster.start(number, [*before, "--"], arguments=options.get("extra", ()))


def reply(cluster: Any, prompt: str, *, number: int = 1, model: str = MODEL) -> list[int]:
    """Token ids of an answer, from the log of the node that holds the last layers."""
    before = set(cluster.nodes[1].replies())
    answer = cluster.ask(number, prompt, model=model)
    assert answer.status_code == 200, f"{answer.text}\n{cluster.tail()}"
    (new,) = set(cluster.nodes[1].replies()) - before
    return list(cluster.nodes[1].replies()[new])


def loads(node: Any, model: str = MODEL) -> list[str]:
    """Its lines about layers that it began to load."""
    return [line for line in node.said() if re.match(rf"loading layers \d+:\d+ of {model}, ", line)]


def resident_bytes(node: Any) -> dict[str, int]:
    """Layers that it says it holds, and their bytes."""
    found = [re.match(r"holds layers (\d+:\d+) of \w+: (\d+) bytes resident", line) for line in node.said()]
    return {match[1]: int(match[2]) for match in found if match}


def test_each_node_loads_its_own_layers_on_the_first_prompt_and_both_answer_as_one_process(
    start: Any, legacy_models: Any, tiny: Path
) -> None:
    cluster = start(tiny, tiny)
    first, second = cluster.nodes
    assert not loads(first) and not loads(second)
    expected = [legacy_models.kimi_reply(tiny, prompt, TOKENS) for prompt in PROMPTS]
    assert [reply(cluster, prompt) for prompt in PROMPTS] == expected
    index = open_index(tiny)
    for node, (begin, end) in ((first, (0, 5)), (second, (5, 7))):
        assert len(loads(node)) == 1
        ((layers, held),) = resident_bytes(node).items()
        assert layers == f"{begin}:{end}"
        assert abs(held - resolve(index, begin, end).resident_bytes) < 4096
    # In parallel: the second began before the first was done with the prompt, on the status that began it.
    text = second.text()
    assert text.index("loading layers 5:7") < text.index("Triggering all on_token callbacks")
    assert "node2 holds layers 5:7" in "\n".join(first.said())
    # Two at once, each with caches of its own.
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cluster.ask, number, PROMPTS[number], model=MODEL) for number in (1, 2)]
        assert [each.result().status_code for each in both] == [200, 200]
    assert sorted(list(second.replies().values())[-2:]) == sorted(expected[1:])
    # From the other node, in pieces of a long prompt, and streamed.
    assert reply(cluster, PROMPTS[0], number=2) == expected[0]
    long = "the sea is deep. " * 150  # two pieces
    assert reply(cluster, long) == legacy_models.kimi_reply(tiny, long, TOKENS)
    stream = cluster.ask(2, PROMPTS[2], model=MODEL, stream=True)
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert KimiTokenizer.from_directory(tiny).decode(expected[2]) == text


def test_a_turn_ends(start: Any, legacy_models: Any, tiny: Path, tmp_path: Path) -> None:
    token = legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS)[5]
    model = legacy_models.ending(tiny, tmp_path / "ending", token)
    expected = legacy_models.kimi_reply(model, PROMPTS[0], TOKENS)
    assert len(expected) == 6 and expected[-1] == KimiTokenizer.from_directory(model).special["<|im_end|>"]
    cluster = start(model, model)
    answer = cluster.ask(1, PROMPTS[0], model=MODEL)
    (found,) = cluster.nodes[1].replies().values()
    assert found == expected
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["choices"][0]["message"]["content"] == KimiTokenizer.from_directory(model).decode(
        expected[:-1]
    )


def post(node: Any, **options: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPTS[0]}], **options}
    return httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)


def test_wishes_of_a_request_are_honoured_or_refused_by_name(start: Any, legacy_models: Any, tiny: Path) -> None:
    cluster = start(tiny, tiny)
    said = KimiTokenizer.from_directory(tiny).decode(legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS))
    for node in cluster.nodes:
        short = post(node, max_tokens=3).json()
        assert short["usage"]["completion_tokens"] == 3 and said.startswith(short["choices"][0]["message"]["content"])
        stopped = post(node, stop=[said[4:6]]).json()["choices"][0]
        assert stopped["message"]["content"] == said[: said.index(said[4:6])] and stopped["finish_reason"] == "stop"
        hot, again = (post(node, temperature=2, seed=7).json()["choices"][0]["message"]["content"] for _ in range(2))
        assert hot == again != said
        assert post(node, temperature=2, seed=7, top_p=1e-6).json()["choices"][0]["message"]["content"] == said
        seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
        refused = post(node, messages=seen)
        assert refused.status_code == 400 and "images" in refused.json()["error"]["message"]


def test_a_frozen_node_is_an_error_within_the_deadline_and_serves_again_when_it_is_back(
    start: Any, legacy_models: Any, tiny: Path
) -> None:
    cluster = start(tiny, tiny, extra=("--max-generate-tokens", "6000"))
    expected = KimiTokenizer.from_directory(tiny).decode(legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS))
    first, second = cluster.nodes
    assert post(first, max_tokens=TOKENS).json()["choices"][0]["message"]["content"] == expected
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(post, first, stream=True)
        time.sleep(3)
        os.kill(second.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            text = streaming.result(timeout=60).text
            took_s = time.monotonic() - began
            refused = post(first, max_tokens=TOKENS)
        finally:
            os.kill(second.process.pid, signal.SIGCONT)
    print(f"the stream ended {took_s:.1f} s after the freeze: {text[-400:]}")
    assert took_s < 45 and "node2 is silent" in text and text.rstrip().endswith("[DONE]")
    assert refused.status_code >= 500 and "node2" in refused.text
    deadline = time.monotonic() + 60
    while (answer := post(first, max_tokens=TOKENS)).status_code != 200:
        assert time.monotonic() < deadline, f"{answer.text}\n{cluster.tail()}"
        time.sleep(1)
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_preload_loads_at_start_and_a_changed_cluster_loads_nothing_anew(
    start: Any, real_legacy: Any, legacy_models: Any, legacy_plan: Path, tiny: Path
) -> None:
    cluster = start(tiny, tiny, preload=True)
    real_legacy.wait_until(lambda: all(resident_bytes(node) for node in cluster.nodes), 60, cluster.tail)
    assert not cluster.nodes[1].replies()
    expected = legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS)
    assert reply(cluster, PROMPTS[0]) == expected
    # The second leaves: exo gives the first a new engine object and, alone, all layers. The plan says otherwise.
    os.killpg(cluster.nodes[1].process.pid, signal.SIGKILL)
    cluster.nodes[1].process.wait(10)
    alone = cluster.nodes[:1]
    topology = f"{cluster.nodes[0].url}/topology"
    nodes = lambda: real_legacy.httpx.get(topology, timeout=10, trust_env=False).json()["nodes"]  # noqa: E731
    real_legacy.wait_until(lambda: len(nodes()) == 1, 90, cluster.tail)
    refused = cluster.ask(1, PROMPTS[0], model=MODEL)
    assert refused.status_code == 503 and "node2 is" in refused.text, refused.text  # silent, or not in the cluster
    start_node(cluster, real_legacy, legacy_plan, 2, tiny)
    cluster.wait_seen()
    assert reply(cluster, PROMPTS[0]) == expected
    assert len(loads(alone[0])) == 1


def test_a_node_killed_in_mid_answer_is_an_error_and_asking_again_works_when_it_is_back(
    start: Any, real_legacy: Any, legacy_models: Any, legacy_plan: Path, tiny: Path
) -> None:
    cluster = start(tiny, tiny, extra=("--max-generate-tokens", "4000"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.ask, 1, PROMPTS[0], model=MODEL)
        real_legacy.wait_until(
            lambda: any(len(ids) > 20 for ids in cluster.nodes[1].replies().values()), 60, cluster.tail
        )
        began_s = time.monotonic()
        os.killpg(cluster.nodes[1].process.pid, signal.SIGKILL)
        answer = asked.result()
        assert time.monotonic() - began_s < 15, cluster.tail()
    assert answer.status_code == 500 and "node1: " in answer.text, answer.text
    cluster.nodes[1].process.wait(10)
    start_node(cluster, real_legacy, legacy_plan, 2, tiny)
    cluster.wait_seen()
    real_legacy.wait_until(lambda: cluster.ask(1, PROMPTS[0], model=MODEL).status_code == 200, 60, cluster.tail)
    assert list(cluster.nodes[1].replies().values())[-1] == legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS)


def test_a_missing_tensor_is_refused_by_name(
    start: Any, real_legacy: Any, legacy_plan: Path, tiny: Path, tmp_path: Path, lose_tensor: Any
) -> None:
    name = "model.layers.6.mlp.switch_mlp.down_proj.weight"
    whole = shutil.copytree(tiny, tmp_path / "copy")
    cluster = start(tiny, whole)
    lose_tensor(whole, whole, name)  # after it was checked at start
    refused = cluster.ask(1, PROMPTS[0], model=MODEL)
    assert refused.status_code == 500 and name.removesuffix(".weight") in refused.text, refused.text
    assert "node2" in refused.text
    cluster.nodes[1].stop()
    again = start_node(cluster, real_legacy, legacy_plan, 2, whole)
    assert again.process.wait(60) == 1
    assert name.removesuffix(".weight") in again.text()[-2000:]
    # The first node has all that it needs in such a directory.
    cluster.nodes[0].stop()
    first = start_node(cluster, real_legacy, legacy_plan, 1, whole)
    real_legacy.wait_until(lambda: "its layers 0:5 are in" in first.text(), 60, cluster.tail)


def test_a_llama_beside_it_answers_as_ever(start: Any, legacy_models: Any, tiny: Path, tmp_path: Path) -> None:
    llama = legacy_models.make_llama(tmp_path / "llama")
    for number in (1, 2):
        legacy_models.give_to_exo(llama, tmp_path / f"node{number}")
    cluster = start(tiny, tiny)
    expected = legacy_models.kimi_reply(tiny, PROMPTS[0], TOKENS)
    assert reply(cluster, PROMPTS[0]) == expected
    prompt = "the sea is deep and blue"
    theirs = legacy_models.llama_reply(llama, prompt, TOKENS)
    assert reply(cluster, prompt, model=legacy_models.LLAMA_CARD) == theirs
    assert any(line.startswith(f"frees {MODEL}") for line in cluster.nodes[0].said())
    assert reply(cluster, prompt, number=2, model=legacy_models.LLAMA_CARD) == theirs
    assert reply(cluster, PROMPTS[0]) == expected
    assert [len(loads(node)) for node in cluster.nodes] == [2, 2]
