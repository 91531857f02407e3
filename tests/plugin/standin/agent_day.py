"""An agent day: two real exo nodes that nobody tends, scripted agents, and a sleep or a death every few minutes.

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python tests/plugin/standin/agent_day.py --hours 6 --every-min 10 --out DIR

Both nodes keep one plan of the shipped tiny Kimi (in fp32, so that its greedy answers are always the same). The agents chat, call
tools and give their results back, send long prompts, cancel streams and repeat themselves; every answer is held against what was
answered before the first fault. Each request ends as one of:

    right     the same answer as on a quiet cluster, or a stream that the agent itself cancelled
    told      a status or an error event with words, or a connection that the asked machine refused: the agent can try again
    asleep    no answer from the API of a machine that was stopped meanwhile
    silent    no byte, no finish reason, or nothing within two minutes, from a machine that was up
    unclear   an error without words
    wrong     a complete answer that is another one

Recovery is counted from a fault's end (a machine thawed or started again, a process killed) to the first right answer. It ends
with 0 when nothing was silent, unclear or wrong, and every recovery took at most 60 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from exo_kimi.bench.setups.exo_here import find_exo
from exo_kimi.bench.setups.exo_nodes import ExoCluster, ExoNode, exo_cluster
from exo_kimi.client.demo import shipped_model
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.train.export import requantize

MODEL = "lab/kimi-k2-day"
SPLIT = (4, 2)
SLEEP_S, SILENT_S, BAR_S = 60.0, 120.0, 60.0
ANSWER_TOKENS = 96
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
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITIES = ("Oslo", "Rome", "Paris", "Lima", "Cairo")
SUMS = [(a, b) for a in (12, 23, 58, 41) for b in (36, 17, 25)]
PROBE = ({"role": "user", "content": "How much is 12 plus 36?"},)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request: `kind` as in the module's list, or `answer` while it is not compared yet."""

    kind: str
    text: str


@dataclass
class Day:
    """What happens, counted; times are seconds since the day's beginning."""

    out: Any
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    asleep: set[str] = field(default_factory=set)
    slept_until: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began

    def note(self, **told: Any) -> None:
        with self.lock:
            self.out.write(json.dumps({"at_s": round(self.now_s, 1)} | told, ensure_ascii=False) + "\n")
            self.out.flush()

    def count(self, scenario: str, reply: Reply, began_s: float) -> None:
        with self.lock:
            self.counts[reply.kind] += 1
        if reply.kind != "right":
            seconds = round(self.now_s - began_s, 1)
            self.note(request=scenario, kind=reply.kind, text=reply.text[:300], seconds=seconds)

    def slept(self, address: str, began_s: float) -> bool:
        """Whether a machine was stopped at any time since."""
        return address in self.asleep or self.slept_until.get(address, -1.0) >= began_s


def main(arguments: Sequence[str]) -> int:
    """Live the day, and say how it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--every-min", type=float, default=10.0, help="a fault every so many minutes")
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for the log (default: a temporary one)")
    told = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes end with it
    exo = find_exo()
    if isinstance(exo, str):
        parser.error(exo)
    folder = told.out or Path(tempfile.mkdtemp(prefix="agent-day-"))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(_model(folder / "kimi"), folder / "models", model_id=MODEL)
    plan = folder / "plan.json"
    plan.unlink(missing_ok=True)
    with (folder / "day.jsonl").open("a", encoding="utf-8") as out:
        extra = {"KEPT_PLAN": str(plan)}
        with exo_cluster(exo, folder / "nodes", folder / "models", plugin=KEEPERS, extra=extra) as cluster:
            with ExoClient(cluster.url) as client:
                exo_plan(
                    client.state(), folder / "kimi", model_id=MODEL, context=4096, split=SPLIT, our_engine=True
                ).plan.save(plan)
            day = Day(out)
            _recovered(day, cluster, "the beginning")
            right = {name: _reference(cluster, messages, options) for name, messages, options in requests()}
            day.began, day.recoveries = time.monotonic(), []
            _live(day, cluster, right, told)
    return _tell(day, folder)


def _model(directory: Path) -> Path:
    """The shipped Kimi with 8 bits a weight and everything else in fp32: bf16 sums depend on what is computed together."""
    if not directory.exists():
        requantize(shipped_model(), directory, recipe="uniform-8")
        file = directory / "model.safetensors"
        with safe_open(file, "numpy") as tensors:
            cast = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        save_file(
            {
                name: each.astype(np.float32) if each.dtype == ml_dtypes.bfloat16 else each
                for name, each in cast.items()
            },
            file,
            metadata={"format": "mlx"},
        )
    return directory


def requests() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Every request that has a right answer: its name, its messages, and what else it sends."""
    history: list[dict[str, Any]] = []
    for a, b in SUMS:
        question = {"role": "user", "content": f"How much is {a} plus {b}?"}
        yield f"chat {a}+{b}", [question], {}
        history += [question, {"role": "assistant", "content": f"{a} + {b} = {a + b}."}]
    for count in (6, len(history)):
        asked = {"role": "user", "content": "What is the capital of Norway?"}
        yield f"long {count}", [*history[:count], asked], {}
    for city in CITIES:
        asked = {"role": "user", "content": f"What is the weather in {city}?"}
        yield f"tool {city}", [asked], {"tools": [WEATHER]}
        call = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        called = {"id": "functions.get_weather:0", "type": "function", "function": call}
        result = {"role": "tool", "tool_call_id": called["id"], "content": '{"sky": "rain", "degrees": 7}'}
        turn = [asked, {"role": "assistant", "content": "", "tool_calls": [called]}, result]
        yield f"result {city}", turn, {"tools": [WEATHER]}


def _live(day: Day, cluster: ExoCluster, right: dict[str, str], told: argparse.Namespace) -> None:
    over = threading.Event()
    asked = {name: (messages, options) for name, messages, options in requests()}
    threads = [
        threading.Thread(target=_agent, args=(day, cluster, right, asked, random.Random(told.seed + n), over))
        for n in range(told.agents)
    ]
    for thread in threads:
        thread.start()
    try:
        faults = FAULTS * 1000
        end = day.began + told.hours * 3600
        for name, fault in faults:
            time.sleep(max(0.0, min(told.every_min * 60, end - time.monotonic())))
            if time.monotonic() >= end:
                break
            day.note(fault=name)
            fault(day, cluster)
            day.note(fault_ended=name)
            _recovered(day, cluster, name)
    finally:
        over.set()
        for thread in threads:
            thread.join(SILENT_S + 30)


def _agent(
    day: Day,
    cluster: ExoCluster,
    right: dict[str, str],
    asked: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]],
    chance: random.Random,
    over: threading.Event,
) -> None:
    while not over.is_set():
        name = chance.choice(sorted(asked))
        messages, options = asked[name]
        cancel = chance.random() < 0.15
        for _ in range(2 if chance.random() < 0.2 else 1):  # agents repeat themselves
            node = _awake(day, cluster)
            began_s = day.now_s
            reply = _ask(node, messages, options, stream=cancel or chance.random() < 0.5, cancel=cancel)
            day.count(name, _judged(day, node, reply, right[name], began_s), began_s)
        over.wait(chance.uniform(0.2, 1.5))


def _judged(day: Day, node: ExoNode, reply: Reply, right: str, began_s: float) -> Reply:
    if reply.kind == "answer":
        return Reply("right" if reply.text == right else "wrong", f"{reply.text!r}, not {right!r}")
    if reply.kind == "silent" and day.slept(node.address, began_s):
        return Reply("asleep", reply.text)
    if (
        reply.kind == "broken"
    ):  # the connection ended: clear where the asked machine has died, else an answer without an end
        return Reply("told" if day.slept(node.address, began_s) else "silent", reply.text)
    return reply


def _awake(day: Day, cluster: ExoCluster) -> ExoNode:
    """An agent asks the first machine, and the other one when that is away."""
    return next((node for node in cluster.nodes if node.address not in day.asleep), cluster.nodes[0])


def _reference(cluster: ExoCluster, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """What a quiet cluster answers, the same twice, streamed and not."""
    replies = [_ask(cluster.nodes[n], messages, options, stream=bool(n), cancel=False) for n in (0, 1)]
    if len({(reply.kind, reply.text) for reply in replies}) != 1 or replies[0].kind != "answer":
        raise SystemExit(f"no two equal answers on a quiet cluster: {messages[-1]}: {replies}")
    return replies[0].text


def _ask(
    node: ExoNode, messages: Sequence[dict[str, Any]], options: dict[str, Any], *, stream: bool, cancel: bool
) -> Reply:
    body = {"model": MODEL, "messages": list(messages), "max_tokens": ANSWER_TOKENS, "temperature": 0, **options}
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(SILENT_S, connect=10), trust_env=False) as client,
            client.stream("POST", f"{node.url}/v1/chat/completions", json=body | {"stream": stream}) as response,
        ):
            if response.status_code >= 400 or not stream:
                return _whole(response.status_code, response.read())
            return _streamed(response.iter_lines(), cancel=cancel)
    except httpx.ConnectError as error:
        return Reply("told", f"connection refused: {error}")
    except httpx.TimeoutException as error:
        return Reply("silent", f"{type(error).__name__} after {SILENT_S:g} s")
    except httpx.TransportError as error:
        return Reply("broken", f"{type(error).__name__}: {error}")


def _whole(status: int, content: bytes) -> Reply:
    if not content:
        return Reply("silent", f"{status} without a byte")
    try:
        body = json.loads(content)
    except ValueError:
        return Reply("unclear", f"{status}: {content[:200]!r}")
    if status >= 400 or "error" in body:
        words = (body.get("error") or {}).get("message") or body.get("detail")
        return Reply("told" if words else "unclear", f"{status}: {words or body}")
    choice = body["choices"][0]
    if choice.get("finish_reason") is None:
        return Reply("silent", f"no finish reason: {body}")
    if choice["finish_reason"] == "error":
        return Reply("told" if choice["message"].get("content") else "unclear", str(choice))
    return Reply("answer", _said(choice["message"]))


def _streamed(lines: Iterator[str], *, cancel: bool) -> Reply:
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish, count = None, 0
    for line in lines:
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            words = chunk["error"].get("message")
            return Reply("told" if words else "unclear", f"in a stream: {words or chunk}")
        for choice in chunk.get("choices", ()):
            delta = choice["delta"]
            for part in ("content", "reasoning_content"):
                message[part] += delta.get(part) or ""
            _add_calls(message["tool_calls"], delta.get("tool_calls") or [])
            finish = choice.get("finish_reason") or finish
        count += 1
        if cancel and count == 2:
            return Reply("right", "cancelled by the agent")
    if finish is None:
        return Reply("silent", f"a stream without an end, after {count} chunks: {message}")
    if finish == "error":
        return Reply("told" if message["content"] else "unclear", str(message))
    return Reply("answer", _said(message))


def _add_calls(calls: list[dict[str, str]], deltas: list[dict[str, Any]]) -> None:
    for delta in deltas:
        while len(calls) <= delta.get("index", 0):
            calls.append({"name": "", "arguments": ""})
        function = delta.get("function") or {}
        for part in ("name", "arguments"):
            calls[delta.get("index", 0)][part] += function.get(part) or ""


def _said(message: dict[str, Any]) -> str:
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    arguments = [(call["name"], json.loads(call["arguments"] or "{}")) for call in calls]
    thought = message.get("reasoning_content") or ""
    return json.dumps([thought.strip(), (message.get("content") or "").strip(), arguments], ensure_ascii=False)


# --- faults: each returns at its end, when the machine is back


def _processes(node: ExoNode) -> list[int]:
    return [node.process.pid, *node.children()]


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _runner_sleeps(number: int) -> Callable[[Day, ExoCluster], None]:
    def fault(day: Day, cluster: ExoCluster) -> None:
        stopped = cluster.nodes[number].runners()
        _signal(stopped, signal.SIGSTOP)
        time.sleep(SLEEP_S)
        _signal(stopped, signal.SIGCONT)

    return fault


def _runner_dies(number: int) -> Callable[[Day, ExoCluster], None]:
    def fault(day: Day, cluster: ExoCluster) -> None:
        runners = cluster.nodes[number].runners()
        _signal(runners[-1:], signal.SIGKILL)

    return fault


def _machine_sleeps(number: int) -> Callable[[Day, ExoCluster], None]:
    def fault(day: Day, cluster: ExoCluster) -> None:
        node = cluster.nodes[number]
        stopped = _processes(node)
        with _away(day, [node]):
            _signal(stopped, signal.SIGSTOP)
            time.sleep(SLEEP_S)
            _signal(stopped, signal.SIGCONT)

    return fault


def _machines_restart(*numbers: int) -> Callable[[Day, ExoCluster], None]:
    def fault(day: Day, cluster: ExoCluster) -> None:
        gone = [cluster.nodes[number] for number in numbers]
        with _away(day, gone):
            for node in gone:
                node.stop()
            time.sleep(10)
            for node in gone:
                cluster.start(node.number)

    return fault


@contextlib.contextmanager
def _away(day: Day, nodes: Sequence[ExoNode]) -> Iterator[None]:
    day.asleep |= {node.address for node in nodes}
    try:
        yield
    finally:
        for node in nodes:
            day.slept_until[node.address] = day.now_s + 15  # until it knows again who is there
            day.asleep.discard(node.address)


FAULTS = [
    ("the runner on 2 sleeps", _runner_sleeps(1)),
    ("the runner on 1 dies", _runner_dies(0)),
    ("machine 2 sleeps", _machine_sleeps(1)),
    ("machine 2 restarts", _machines_restart(1)),
    ("the runner on 1 sleeps", _runner_sleeps(0)),
    ("machine 1 sleeps", _machine_sleeps(0)),
    ("a power cut: both restart", _machines_restart(0, 1)),
    ("the runner on 2 dies", _runner_dies(1)),
]


def _recovered(day: Day, cluster: ExoCluster, fault: str) -> None:
    """Ask each second until there is a right answer, at most ten minutes."""
    began = time.monotonic()
    while time.monotonic() - began < 600:
        for node in cluster.nodes:
            reply = _ask_soon(node)
            if reply.kind == "answer" and "48" in reply.text:
                seconds = time.monotonic() - began
                day.recoveries.append((fault, seconds))
                day.note(recovered=fault, seconds=round(seconds, 1))
                return
        time.sleep(1.0)
    day.recoveries.append((fault, float("inf")))
    day.note(not_recovered=fault, logs=cluster.tail())


def _ask_soon(node: ExoNode) -> Reply:
    """The probe, by a client that has little patience."""
    body = {"model": MODEL, "messages": list(PROBE), "max_tokens": ANSWER_TOKENS, "temperature": 0}
    try:
        response = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=10, trust_env=False)
        return _whole(response.status_code, response.content)
    except httpx.HTTPError as error:
        return Reply("told", str(error))


def _tell(day: Day, folder: Path) -> int:
    kinds = ("right", "told", "asleep", "silent", "unclear", "wrong")
    print(f"{day.now_s / 3600:.2f} hours, {sum(day.counts.values())} requests, {len(day.recoveries)} faults; {folder}")
    print(", ".join(f"{day.counts[kind]} {kind}" for kind in kinds))
    for name, seconds in day.recoveries:
        print(f"  {name}: right again after {seconds:.1f} s")
    slow = [name for name, seconds in day.recoveries if seconds > BAR_S]
    summary = {
        "hours": round(day.now_s / 3600, 3),
        "counts": {kind: day.counts[kind] for kind in kinds},
        "recovered_s": [[name, round(seconds, 1)] for name, seconds in day.recoveries],
    }
    print(json.dumps(summary))
    return 1 if slow or any(day.counts[kind] for kind in ("silent", "unclear", "wrong")) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
