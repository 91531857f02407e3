"""`exo-kimi status` against a server that answers, one that wants a key, and none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from exo_kimi import cli
from exo_kimi.cli import owner_commands
from exo_kimi.errors import UsageError
from exo_kimi.owner import asking, status
from exo_kimi.owner.asking import ServerToAsk, server_at
from exo_kimi.owner.directories import OwnerDirectories
from exo_kimi.owner.service.install import Services
from exo_kimi.owner.service.manager import Systemd
from exo_kimi.owner.service.spec import ServiceSpec
from exo_kimi.owner.status import option_of, server_lines, server_of, status_lines
from exo_kimi.runtime.requests import EngineSnapshot, RequestProgress, StageHealth
from exo_kimi.serve.health import health_report
from exo_kimi.serve.metrics import Metrics
from tests.owner.test_service import System


class Answering(BaseHTTPRequestHandler):
    """/health and /metrics of an engine that generates 10 tokens a look."""

    generated = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        stage = StageHealth(
            stage=0,
            address="ipc",
            state="ready",
            start_layer=0,
            end_layer=44,
            weights_bytes=3 << 30,
            last_error="gone\nby",
        )
        snapshot = EngineSnapshot(
            ready=True,
            stages=(stage,),
            requests=(
                RequestProgress(request_id="a", state="decode", prompt_tokens=3, prompt_done=3, generated_tokens=1),
            ),
            context=4096,
            kv_capacity_tokens=1000,
            kv_reserved_tokens=64,
            requests_total=7,
            requests_failed_total=2,
            generated_tokens_total=Answering.generated,
            events=("2026-01-01T00:00:00Z StageDiedError: stage 0 was killed",),
        )
        body: Any = {"status": "ok"}
        if self.headers.get("authorization") == "Bearer secret":
            _, body = health_report(snapshot, model="kimi", version="1.2")
        data = json.dumps(body).encode()
        if self.path == "/metrics":
            Answering.generated += 10
            data = Metrics(lambda: snapshot).text()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LOOK_S", 0.05)


def test_a_server_tells_its_stages_speed_memory_and_faults(url: str) -> None:
    text = "\n".join(server_lines(ServerToAsk(url=url, key="secret")))
    for words in (
        "ok",
        "model    kimi, exo-kimi 1.2, context 4096",
        "stage 0  ready, layers 0:44, 3.00 GiB weights",
        "last error: gone",
        "0 waiting, 0 prefill, 1 decode",
        "64 of 1000 tokens held",
        "7 requests, 2 failed",
        "stage 0 was killed",
    ):
        assert words in text, text
    assert "by" not in text.split("last error: gone")[1].splitlines()[0]
    assert float(text.partition("speed")[2].split()[0]) > 10


def test_without_the_key_it_says_so_and_without_a_server_too(url: str) -> None:
    assert "it tells the rest with its key only" in server_lines(ServerToAsk(url=url))[-1]
    assert "it does not take this key" in server_lines(ServerToAsk(url=url, key="another"))[-1]
    (line,) = server_lines(ServerToAsk(url="http://127.0.0.1:9"))
    assert "no exo-kimi server answers at http://127.0.0.1:9: it cannot be reached" in line


class Stranger(BaseHTTPRequestHandler):
    """Answers /health with whatever the test says, and /metrics with the same."""

    body, status = b"", 200

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(Stranger.status)
        self.send_header("content-length", str(len(Stranger.body)))
        self.end_headers()
        self.wfile.write(Stranger.body)


@pytest.fixture
def stranger() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"[1, 2]", "another program answers there"),
        (b"<html>", "another program answers there"),
        (b"\xff\xfe", "another program answers there"),
        (b'{"ok": true}', "another program answers there"),
        (b'{"status": "ok", "version": "9.9", "stages": "many"}', "of another version (9.9, this is "),
        (b'{"status": "ok", "version": "9.9", "stages": [{"stage": 0}]}', "of another version (9.9, this is "),
        (b'{"status": "ok"}', "it tells the rest with its key only"),
    ],
)
def test_what_answers_in_other_words_is_one_line(stranger: str, body: bytes, found: str) -> None:
    Stranger.body = body
    lines = server_lines(ServerToAsk(url=stranger))
    assert found in lines[-1] and len(lines) <= 2


@pytest.mark.parametrize(
    ("answer", "found"), [(b"\0\1\2 no HTTP\r\n", "no HTTP server"), (None, "it says nothing for 0.2 s")]
)
def test_a_port_that_speaks_no_http_or_says_nothing_is_told(
    answer: bytes | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept = []

        def serve() -> None:
            connection, _ = listening.accept()
            kept.append(connection)
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        (line,) = server_lines(ServerToAsk(url=f"http://127.0.0.1:{listening.getsockname()[1]}"))
        thread.join()
        for connection in kept:
            connection.close()
    assert found in line


def test_an_address_is_taken_as_it_is_typed_and_nonsense_refused() -> None:
    assert server_at("127.0.0.1:52415", None).url == server_at(None, None).url == "http://127.0.0.1:52415"
    assert server_at("http://mac.local:1/", "k") == ServerToAsk(url="http://mac.local:1", key="k")
    for wrong in ("http://", "ftp://x", "http://[::1", "http://x:port"):
        with pytest.raises(UsageError, match="not a server's address"):
            server_at(wrong, None)


def test_the_server_of_a_service_is_asked_with_its_key(url: str, tmp_path: Path) -> None:
    directories = OwnerDirectories(services=tmp_path / "s", logs=tmp_path / "l", units=tmp_path / "u")
    services = Services(directories, Systemd(directories, System("ActiveState=active\nSubState=running\n")))
    assert server_of(services) is None
    key = tmp_path / "api.key"
    key.write_text("secret\n")
    key.chmod(0o600)
    words = ("serve", "x", "--host", "0.0.0.0", f"--port={url.rpartition(':')[2]}", "--api-key-file", "api.key")
    ServiceSpec(name="serve", words=(*words, "--plan", "gone.json"), directory=str(tmp_path)).write(
        directories.services
    )
    directories.logs.mkdir()
    (directories.logs / "serve.log").write_text("2026-01-01 00:00:00,000 ERROR it broke\n")
    assert server_of(services) == ServerToAsk(url=url, key="secret")
    text = "\n".join(status_lines(services, None))
    for words_found in (
        "exo-kimi ",
        "active (running)",
        "serve said: 2026",
        "it broke",
        "plan of serve: ",
        "stage 0  ready",
    ):
        assert words_found in text, text
    assert "secret" not in text


def test_the_exit_status_says_whether_a_server_answers(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directories = OwnerDirectories(services=tmp_path / "s", logs=tmp_path / "l", units=tmp_path / "u")
    monkeypatch.setattr(owner_commands, "_services", lambda: Services(directories, Systemd(directories, System(""))))
    monkeypatch.delenv("EXO_KIMI_API_KEY", raising=False)
    assert cli.main(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert "no exo-kimi server answers at http://127.0.0.1:9" in capsys.readouterr().out
    assert cli.main(["status", "--url", url]) == 0
    assert f"server at {url}: ok" in capsys.readouterr().out


def test_options_are_found_among_words() -> None:
    assert option_of(["serve", "--port", "1"], "--port") == "1"
    assert option_of(["serve", "--port=2"], "--port") == "2"
    assert option_of(["serve", "--port"], "--port") is None
