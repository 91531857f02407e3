"""The whole of it as a user runs it: `exo-kimi serve` in a process, two stage processes, real HTTP, and rough treatment."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from exo_kimi.checkpoint.tiny.make import make_tiny

ROOT = Path(__file__).parents[1]
START_S = 90.0
STALL_S = 2.0
EXO_KIMI = [sys.executable, "-m", "exo_kimi"]


class Server:
    """A running `exo-kimi serve` and a client for it."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.http = httpx.Client(base_url=url, timeout=60.0, trust_env=False)

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = self.http.get("/health").json()
        return report

    def pids(self) -> list[int]:
        return [stage["pid"] for stage in self.health()["stages"]]

    def local_pids(self) -> list[int]:
        """Of the stages that the server started itself."""
        return [stage["pid"] for stage in self.health()["stages"] if stage["address"].startswith("ipc:")]

    def wait_ready(self) -> None:
        wait_until(lambda: self.health()["status"] == "ok", START_S)

    def ask(self, *, max_tokens: int = 8, **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens, "temperature": 0, **more}
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, f"{name} is not in /metrics"
        return float(found[1])


def wait_until(true: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    state = Path(f"/proc/{pid}/stat")
    if state.parent.parent.joinpath("self").exists():
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def serving(directory: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    command = [*EXO_KIMI, "serve", str(directory), "--port", "0", "--dtype", "float32", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True)
    reader.start()
    pids: list[int] = []
    try:
        wait_until(lambda: process.poll() is not None or any("serving at" in line for line in log), START_S)
        assert process.poll() is None, "".join(log)
        url = next(re.search(r"serving at (\S+)", line)[1] for line in log if "serving at" in line)  # type: ignore[index]
        server = Server(process, url, log)
        server.wait_ready()
        yield server
        pids = [] if process.poll() is not None else server.local_pids()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        reader.join(5)
    assert process.returncode == 0, "".join(log)
    assert not [line for line in log if "Traceback" in line], "".join(log)
    assert [pid for pid in pids if alive(pid)] == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
    }
    return make_tiny(tmp_path_factory.mktemp("system") / "tiny", config={**small, "n_routed_experts": 8})


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with serving(tiny, "--stages", "2", "--stall-deadline", f"{STALL_S}s") as running:
        yield running


def test_stages_answer_and_health_names_their_layers(server: Server) -> None:
    answer = server.ask()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    ranges = [(stage["start_layer"], stage["end_layer"]) for stage in server.health()["stages"]]
    assert ranges[0][0] == 0 and ranges[0][1] == ranges[1][0] and ranges[1][1] == 7


def test_sixty_four_requests_at_once_are_all_answered_alike(server: Server) -> None:
    alone = server.ask().json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: server.ask(), range(64)))
    assert [answer.status_code for answer in answers] == [200] * 64
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {alone}
    wait_until(lambda: server.metric("exo_kimi_kv_reserved_tokens") == 0, 10)


def test_a_client_that_leaves_in_mid_stream_frees_its_memory_on_every_stage(server: Server) -> None:
    cancelled = server.metric("exo_kimi_requests_cancelled_total")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000, "temperature": 0, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "logit_bias": {"1": -100}}) as stream:
        for _, line in zip(range(6), stream.iter_lines(), strict=False):
            assert "error" not in line
    wait_until(lambda: server.metric("exo_kimi_requests_cancelled_total") == cancelled + 1, 10)
    # What it computed stays for a turn that continues it, counted apart; nothing is held for the sequence itself.
    wait_until(lambda: server.metric("exo_kimi_kv_reserved_tokens") == 0, 10)
    assert server.metric("exo_kimi_kv_prefix_tokens") > 0


def test_a_large_malformed_body_is_refused_and_the_server_goes_on(server: Server) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"[" * 100_000, b'{"messages": "' + b"\xff" * 100_000, b"{" + b" " * 100_000, os.urandom(100_000)):
        answer = server.http.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.ask().status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 4}}),
        ("/api/generate", {"prompt": "hi", "options": {"num_predict": 4}}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_at_every_door_a_request_has_one_id(server: Server, path: str, body: dict[str, Any], stream: bool) -> None:
    answer = server.http.post(path, json={**body, "model": server.health()["model"], "stream": stream})
    assert answer.status_code == 200, answer.text
    found = answer.headers["x-request-id"]

    def said(words: str) -> bool:
        return any(words in line for line in server.log)

    for stage in (0, 1):
        wait_until(lambda stage=stage: said(f"stage {stage}: INFO {found} begins: "), 30)  # type: ignore[misc]
    wait_until(lambda: said(f"INFO {found} POST '{path}' 200"), 30)
    wait_until(lambda: said(f"INFO {found} length: ") or said(f"INFO {found} stop: "), 30)


def test_a_request_has_one_id_in_its_answer_and_in_every_log(server: Server) -> None:
    found = server.ask(n=2).headers["x-request-id"]
    wait_until(lambda: sum(found in line for line in server.log) >= 7, 10)
    lines = [line for line in server.log if found in line]
    assert any(f"INFO {found} POST '/v1/chat/completions' 200" in line for line in lines)
    for name in (found, f"{found}-1"):
        assert any(f"INFO {name} length: " in line for line in lines)
        assert all(any(f"stage {stage}: INFO {name} begins: " in line for line in lines) for stage in (0, 1))


class Streamed:
    """A request that is read as it comes, in a thread: what it says, and everything else that it sent."""

    def __init__(self, server: Server, **more: Any) -> None:
        self.lines: list[str] = []
        body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 1.3, "seed": 5, "stream": True, **more}

        def read() -> None:
            with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
                self.lines.extend(stream.iter_lines())

        self.thread = threading.Thread(target=read)
        self.thread.start()

    def text(self) -> str:
        self.thread.join(60)
        assert self.lines[-2:] == ["data: [DONE]", ""]
        events = [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]
        assert not [event for event in events if "error" in event]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@pytest.mark.parametrize("stage", [0, 1])
def test_an_answer_outlives_a_killed_stage_with_the_same_words(server: Server, stage: int) -> None:
    server.wait_ready()
    before = server.pids()
    right = Streamed(server, max_tokens=300).text()
    failed = server.metric("exo_kimi_requests_failed_total")
    streamed = Streamed(server, max_tokens=300)
    wait_until(lambda: len(streamed.lines) > 40, 20)
    os.kill(before[stage], signal.SIGKILL)
    assert server.ask().status_code == 200, "the next request waits for the stages and is served"
    assert streamed.text() == right
    assert server.metric("exo_kimi_requests_failed_total") == failed
    assert server.metric("exo_kimi_requests_resumed_total") > 0
    after = server.pids()
    assert after[stage] != before[stage] and after[1 - stage] == before[1 - stage], "the healthy stage kept its weights"
    assert any("was killed by signal 9" in event for event in server.health()["events"])
    assert any("was killed by signal 9" in line for line in server.log)


def test_an_answer_outlives_a_frozen_stage_which_is_replaced_within_the_deadline(server: Server) -> None:
    server.wait_ready()
    before = server.pids()
    right = Streamed(server, max_tokens=300).text()
    streamed = Streamed(server, max_tokens=300)
    wait_until(lambda: len(streamed.lines) > 40, 20)
    os.kill(before[1], signal.SIGSTOP)
    frozen_s = time.monotonic()
    assert streamed.text() == right
    assert time.monotonic() - frozen_s < STALL_S + 30
    assert any("stage 1 is silent" in event for event in server.health()["events"])
    wait_until(lambda: not alive(before[1]), 20)
    assert server.ask().status_code == 200
    assert server.pids()[0] == before[0]


def test_without_survival_a_killed_stage_fails_what_is_in_flight_at_once(tiny: Path) -> None:
    with serving(tiny, "--stages", "1", "--survive", "0s") as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(server.ask(max_tokens=4000)))
        asking.start()
        wait_until(lambda: server.metric('exo_kimi_requests_in_flight{state="decode"}') == 1, 20)
        os.kill(server.pids()[0], signal.SIGKILL)
        killed_s = time.monotonic()
        asking.join(60)
        assert time.monotonic() - killed_s < 5
        assert answers[0].status_code == 503
        assert "stage 0 was killed by signal 9" in answers[0].json()["error"]["message"]
        assert server.ask().status_code == 200


def test_ctrl_c_in_the_middle_of_an_answer_leaves_no_process(tiny: Path) -> None:
    lines: list[str] = []
    with serving(tiny, "--split", "5,2") as server:
        pids = server.pids()
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000, "stream": True}

        def ask() -> None:
            with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines.extend(stream.iter_lines())

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: len(lines) > 10, 30)
        server.process.send_signal(signal.SIGINT)
        asking.join(30)
        server.process.wait(20)
    assert any('"error"' in line for line in lines), "the client was told"
    assert [pid for pid in pids if alive(pid)] == []


def test_ctrl_c_on_the_terminal_while_loading_is_quiet(tiny: Path) -> None:
    command = [*EXO_KIMI, "serve", str(tiny), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, process_group=0
    )
    assert process.stdout is not None
    while "serving at" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)  # the stages are importing MLX
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C is for every process of the group
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output, output


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses file names that are not UTF-8")
def test_a_folder_whose_name_is_not_utf8_is_served(tiny: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9t\xe9")
    odd.mkdir()
    for file in tiny.iterdir():
        (odd / file.name).symlink_to(file)
    with serving(odd) as server:
        assert server.ask().status_code == 200
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "\ufffdt\ufffd"
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    shown = subprocess.run([*EXO_KIMI, "inspect", str(odd)], capture_output=True, cwd=ROOT, env=strict, check=False)
    assert shown.returncode == 0, shown.stderr
    assert b"\\udce9t\\udce9" in shown.stdout


def test_a_killed_server_leaves_no_stage_behind(tiny: Path) -> None:
    command = [*EXO_KIMI, "serve", str(tiny), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        found = re.search(r"http\S+", process.stdout.readline())
        assert found
        with httpx.Client(base_url=found[0], trust_env=False) as http:
            wait_until(lambda: http.get("/health").json()["status"] == "ok", START_S)
            pids = [stage["pid"] for stage in http.get("/health").json()["stages"]]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(pids) == 2
    wait_until(lambda: not [pid for pid in pids if alive(pid)], 10)


def test_a_stage_on_another_machine_serves_with_the_right_key_only(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    key_file = tmp_path / "cluster.key"
    command = [*EXO_KIMI, "stage", "--listen", f"127.0.0.1:{port}", "--model", str(tiny), "--key-file", str(key_file)]
    stage = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        wait_until(key_file.exists, START_S)
        other = tmp_path / "other.key"
        other.write_text("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7")
        other.chmod(0o600)
        refused = subprocess.run(
            [*EXO_KIMI, "serve", str(tiny), "--port", "0", "--stage", f"127.0.0.1:{port}", "--key-file", str(other)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
        assert refused.returncode != 0
        assert "key" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
        with serving(tiny, "--stage", f"127.0.0.1:{port}", "--key-file", str(key_file)) as server:
            assert server.ask().status_code == 200
            assert [stage["pid"] for stage in server.health()["stages"]][1] == stage.pid
        assert stage.poll() is None, "a stage waits for the next leader"
        with serving(tiny, "--split", "3,4", "--stage", f"127.0.0.1:{port}", "--key-file", str(key_file)) as server:
            assert server.ask().status_code == 200
    finally:
        stage.send_signal(signal.SIGINT)
        output = stage.communicate(timeout=20)[0]
    assert "Traceback" not in output, output


def test_a_stage_that_cannot_be_reached_is_one_clear_message(tiny: Path) -> None:
    result = subprocess.run(
        [*EXO_KIMI, "serve", str(tiny), "--port", "0", "--stage", f"127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1
    assert "127.0.0.1" in result.stderr and "Traceback" not in result.stderr
    assert "exo-kimi stage" in result.stderr, result.stderr


def test_the_demo_runs_once_from_nothing_to_an_answer() -> None:
    result = subprocess.run(
        [*EXO_KIMI, "demo", "--once", "--port", "0"], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "stage 0 holds layers 0:" in result.stdout and "stage 1 holds layers" in result.stdout
    assert "The capital of Norway is Oslo." in result.stdout
    assert '-> get_weather({"city": "Oslo"})' in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_picture_is_answered_alike_before_and_after_its_stage_was_killed(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 3}
    seeing = make_tiny(tmp_path / "seeing", vision=True, template="k25", config={**small, "n_routed_experts": 4})

    def shown(color: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (90, 60), color).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
        return {"messages": [{"role": "user", "content": parts}], "logprobs": True, "thinking": {"type": "disabled"}}

    def chosen(answer: httpx.Response) -> list[float]:
        assert answer.status_code == 200, answer.text
        return [token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]]

    with serving(seeing, "--stages", "2", "--split", "2,1") as server:
        red, blue = chosen(server.ask(**shown("red"))), chosen(server.ask(**shown("blue")))
        assert red != blue
        again = server.ask(**shown("red"))
        assert chosen(again) == pytest.approx(red, abs=1e-4)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        os.kill(server.pids()[0], signal.SIGKILL)
        wait_until(lambda: server.health()["status"] != "ok", START_S)
        server.wait_ready()
        assert chosen(server.ask(**shown("red"))) == pytest.approx(red, abs=1e-4)
        assert chosen(server.ask(**shown("blue"))) == pytest.approx(blue, abs=1e-4)
