"""Frozen and killed runners and machines, on the real exo: two nodes on loopback with our engine (`exo-kimi exo run`).

How to run (Linux; about ten minutes): as `test_real_exo.py` says, with this file. Status is looked at every second, by exo's own
`/state`; a prompt is asked every five, so that no request is silent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines

pytestmark = [pytest.mark.exo, pytest.mark.timeout(900)]

MODEL = "lab/kimi-k2-tiny"
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)
SERVED_S = 60.0  # after the last machine is back
NOTICED_S = 12.0  # quiet for 5 s, and a busy machine of two cores
SERVING = ("RunnerReady", "RunnerRunning")
KEEPERS = """
import multiprocessing, os, pathlib, threading, time

from exo_kimi.plugin.node.command import keep_beside, kept_plans
from exo_kimi.plugin.runner.launch import bind

assert bind() == (), bind()


def keep(path):
    while not path.exists():
        time.sleep(0.5)
    keep_beside(f"http://{os.environ['NODE_IP']}:52415", kept_plans([path]))


if multiprocessing.current_process().name == "MainProcess":
    threading.Thread(target=keep, args=[pathlib.Path(os.environ["KEPT_PLAN"])], daemon=True).start()
"""


@pytest.fixture(scope="module")
def cluster(exo_head: Any, real_exo: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with our engine."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    models = tmp_path_factory.mktemp("models")
    prepare(tiny, models, model_id=MODEL)
    root = tmp_path_factory.mktemp("exo")
    with real_exo.exo_cluster(exo_head, root, models, plugin=real_exo.BIND_US) as running:
        yield running


@pytest.fixture(scope="module")
def kept(exo_head: Any, real_exo: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes that keep a plan (`exo run --keep`)."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    models = tmp_path_factory.mktemp("models")
    prepare(tiny, models, model_id=MODEL)
    root = tmp_path_factory.mktemp("kept")
    plan = root / "plan.json"
    with real_exo.exo_cluster(exo_head, root, models, plugin=KEEPERS, extra={"KEPT_PLAN": str(plan)}) as running:
        with ExoClient(running.url) as client:
            exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=(5, 2), our_engine=True).plan.save(plan)
        yield running


@dataclass
class Request:
    """One prompt: when it was asked, and what came of it in the end."""

    asked_s: float
    answered_s: float | None = None
    text: str = ""
    error: str = ""


@dataclass
class Watched:
    """What a person at exo sees while something happens: its status every second, and an answer to a prompt every five."""

    url: str
    statuses: list[tuple[float, tuple[str, ...]]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watched:
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._ask)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def _look(self) -> None:
        while not self.stop.wait(1):
            with contextlib.suppress(httpx.HTTPError, KeyError):
                self.statuses.append((time.monotonic(), phases(self.url)))

    def _ask(self) -> None:
        while not self.stop.is_set():
            request = Request(time.monotonic())
            self.requests.append(request)
            threading.Thread(target=self._wait, args=(request,), daemon=True).start()
            self.stop.wait(5)

    def _wait(self, request: Request) -> None:
        try:
            chunks = list(stream(self.url, "one", tokens=3))
        except httpx.HTTPError as error:
            request.error = repr(error)
            chunks = []
        for chunk in chunks:
            if "error" in chunk:
                request.error = str(chunk["error"])
            else:
                request.text += chunk["choices"][0]["delta"].get("content") or ""
        request.answered_s = time.monotonic()

    def served_from(self, after_s: float) -> float:
        """When the first prompt was answered that was asked after a moment."""
        found = [each.answered_s for each in self.requests if each.asked_s >= after_s and each.text and not each.error]
        return min((each for each in found if each is not None), default=float("inf"))


def phases(url: str) -> tuple[str, ...]:
    """The statuses of the runners of the instance; none without an instance."""
    state = httpx.get(f"{url}/state", timeout=5, trust_env=False).json()
    runners = [
        runner
        for instance in state["instances"].values()
        for body in instance.values()
        for runner in body["shardAssignments"]["runnerToShard"]
    ]
    return tuple(next(iter(state["runners"].get(runner, {"RunnerNone": {}}))) for runner in runners)


def serving(url: str) -> bool:
    found = phases(url)
    return bool(found) and all(each in SERVING for each in found)


def stream(url: str, prompt: str, *, tokens: int) -> Iterator[dict[str, Any]]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=150, trust_env=False
    ) as reply:
        if reply.status_code != 200:
            yield {"error": f"{reply.status_code}: {reply.read().decode()}"}
        for line in reply.iter_lines() if reply.status_code == 200 else ():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@pytest.fixture
def placed(cluster: Any, real_exo: Any, tiny: Path) -> Any:
    """The tiny Kimi on both nodes, serving."""
    return place(cluster, real_exo, tiny)


def place(cluster: Any, real_exo: Any, tiny: Path) -> Any:
    if not serving(cluster.url):
        with ExoClient(cluster.url) as client:
            plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=(5, 2), our_engine=True).plan
            apply_plan(client, plan, model_id=MODEL, replace=True, our_engine=True, deadlines=DEADLINES)
    real_exo.wait_until(lambda: serving(cluster.url), 30, cluster.tail)
    return cluster


def rank_of(cluster: Any, rank: int) -> Any:
    """The node with a rank of the instance."""
    state = httpx.get(f"{cluster.url}/state", timeout=5, trust_env=False).json()
    ((body,),) = (instance.values() for instance in state["instances"].values())
    assigned = body["shardAssignments"]
    ranks = {}
    for node, runner in assigned["nodeToRunner"].items():
        (shard,) = assigned["runnerToShard"][runner].values()
        ranks[shard["deviceRank"]] = node
    for node in cluster.nodes:
        own = httpx.get(f"{node.url}/node_id", timeout=5, trust_env=False).json()
        if own == ranks[rank]:
            return node
    raise AssertionError(state)


def told(seen: Watched, began_s: float) -> str:
    lines = [f"{at - began_s:6.1f} {' '.join(each)}" for at, each in seen.statuses]
    lines += [
        f"asked {r.asked_s - began_s:6.1f} "
        f"{'silent' if r.answered_s is None else f'{r.answered_s - began_s:6.1f}'} {r.text!r} {r.error[:150]}"
        for r in seen.requests
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "stream"])
@pytest.mark.parametrize("stopped_s", [40, 60, 75])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_runner_is_told_replaced_or_taken_back_and_no_request_is_silent(
    placed: Any, real_exo: Any, rank: int, stopped_s: float, busy: bool
) -> None:
    """Thawed after 40 s, before the verdict; after 60 s, about then; after 75 s, when another has taken its place."""
    freeze_a_runner(placed, real_exo, rank, stopped_s, busy=busy)


def test_a_frozen_runner_of_v1_0_71_is_replaced_too(exo_71: Any, real_exo: Any, tiny: Path, tmp_path: Path) -> None:
    if isinstance(exo_71, str) or (reason := exo_71.cannot_import_us()):
        pytest.skip(exo_71 if isinstance(exo_71, str) else reason)
    prepare(tiny, tmp_path / "models", model_id=MODEL)
    with real_exo.exo_cluster(exo_71, tmp_path / "exo", tmp_path / "models", plugin=real_exo.BIND_US) as running:
        freeze_a_runner(place(running, real_exo, tiny), real_exo, 1, 60, busy=True)


def freeze_a_runner(placed: Any, real_exo: Any, rank: int, stopped_s: float, *, busy: bool) -> None:
    victim = rank_of(placed, rank).runner()
    reader: list[dict[str, Any]] = []
    streaming = threading.Thread(target=lambda: reader.extend(stream(placed.url, "river", tokens=20_000)), daemon=True)
    if busy:
        streaming.start()
        time.sleep(2)
    os.kill(victim, signal.SIGSTOP)
    began_s = time.monotonic()
    with Watched(placed.url) as seen:
        time.sleep(stopped_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)
        thawed_s = time.monotonic()
        real_exo.wait_until(lambda: seen.served_from(thawed_s) < float("inf"), SERVED_S + 20, placed.tail)
    print(told(seen, began_s))
    assert seen.served_from(thawed_s) - thawed_s < SERVED_S
    lies = [
        at - began_s
        for at, each in seen.statuses
        if began_s + NOTICED_S < at < began_s + min(stopped_s, 40) and each and all(p in SERVING for p in each)
    ]
    assert not lies, told(seen, began_s)
    deadline = time.monotonic() + 60
    while any(each.answered_s is None for each in seen.requests) and time.monotonic() < deadline:
        time.sleep(0.5)
    silent = [each for each in seen.requests if each.answered_s is None or not (each.text or each.error)]
    assert not silent, told(seen, began_s)
    if busy:  # it goes on where the rank came back before exo was told to start anew, and else ends with an error
        before = len(reader)
        streaming.join(30)
        went_on = len(reader) > before if streaming.is_alive() else "finish_reason" in json.dumps(reader[-1])
        assert went_on or "error" in reader[-1], f"{len(reader)} events, {before} before: {reader[-3:]}"


@pytest.mark.parametrize("number", [1, 0], ids=["second", "master"])
def test_a_frozen_machine_is_forgotten_and_serves_again_when_it_wakes(kept: Any, real_exo: Any, number: int) -> None:
    """The node and its runner stop for a minute, as in sleep; the other one is asked. While the master is frozen, exo's own state
    hears nothing new until another is elected, 16 s later."""
    noticed_s = NOTICED_S if number else NOTICED_S + 8
    other = kept.nodes[1 - number]
    real_exo.wait_until(lambda: serving(other.url), 120, kept.tail)
    node = kept.nodes[number]
    pids = (node.process.pid, *real_exo._descendants(node.process.pid))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    with Watched(other.url) as seen:
        time.sleep(60)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        woken_s = time.monotonic()
        with contextlib.suppress(Exception):
            real_exo.wait_until(lambda: seen.served_from(woken_s) < float("inf"), SERVED_S + 60, kept.tail)
        time.sleep(15)
    print(told(seen, began_s))
    lies = [
        at - began_s
        for at, each in seen.statuses
        if began_s + noticed_s < at < woken_s and each and all(phase in SERVING for phase in each)
    ]
    assert not lies
    assert seen.served_from(woken_s) - woken_s < SERVED_S
    deadline = time.monotonic() + 60
    while any(each.answered_s is None for each in seen.requests) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [each for each in seen.requests if each.answered_s is None or not (each.text or each.error)]
