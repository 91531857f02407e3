"""The four commands as the command line calls them: one real socket, plain arguments, text."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi import cli
from exo_kimi.errors import ExoUnreachableError, UsageError
from exo_kimi.plugin.control import command as exo_command

MODEL = "lab/kimi-k2-tiny"


@pytest.fixture
def served(make_exo: Any) -> Iterator[tuple[Any, str]]:
    """A fake exo behind a real socket, and its address."""
    exo = make_exo()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            reply = exo.handle(httpx.Request(self.command, f"http://exo{self.path}", content=body))
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield exo, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_from_a_look_at_the_cluster_to_a_placed_plan(served: tuple[Any, str], tiny: Path, tmp_path: Path) -> None:
    exo, url = served
    assert "2 nodes" in exo_command.status(url)
    text = exo_command.plan(url, str(tiny), model_id=MODEL, context=4096, split=[2, 5], output=tmp_path / "PLAN.json")
    assert "exo alone: studio 7 layers" in text and "exo-kimi exo apply" in text
    lines: list[str] = []
    told = exo_command.apply(url, tmp_path / "PLAN.json", wait=False, echo=lines.append)
    assert "rank 0  studio  layers 0:2" in told
    assert lines and len(exo.instances) == 1


def test_the_printed_next_commands_work_as_they_are(
    served: tuple[Any, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `prepare` on, each command is the one that the last printed; only exo's address is added to the first."""
    exo, url = served
    exo.cards[f"local/kimi-k2-{tiny.name}"] = {**exo.cards[MODEL], "modelId": f"local/kimi-k2-{tiny.name}"}
    for node in exo.nodes:
        node.has.add(f"local/kimi-k2-{tiny.name}")
    folder = tmp_path / "a folder"
    folder.mkdir()
    told = exo_command.make_directory(tiny, folder / "models")
    words = shlex.split(told.partition("all layers: exo-kimi exo plan ")[2])
    words[words.index("PLAN.json")] = str(folder / "PLAN.json")
    assert cli.main(["exo", "plan", *words, "--exo", url, "--context", "4096", "--nodes", "studio,mini"]) == 0
    printed = capsys.readouterr().out.partition("place it: exo-kimi ")[2].partition("\n")[0]
    assert cli.main(shlex.split(printed.replace("--wait", ""))) == 0
    assert len(exo.instances) + len(exo.waiting) == 1
    printed = capsys.readouterr().out.partition("`exo-kimi ")[2].partition("`")[0]
    assert cli.main(shlex.split(printed)) == 0
    assert f"local/kimi-k2-{tiny.name}  instance" in capsys.readouterr().out


def test_a_plan_of_a_published_name_is_placed_with_an_id(served: tuple[Any, str], tmp_path: Path) -> None:
    _, url = served
    path = tmp_path / "PLAN.json"
    text = exo_command.plan(url, "kimi-k2-instruct", recipe="founding", context=8192, our_engine=True, output=path)
    assert f"exo-kimi exo apply {path} --model-id ORG/NAME --exo {url} --wait; ORG/NAME is what" in text


def test_a_prepared_directory_is_told_with_what_to_start_exo_with(tiny: Path, tmp_path: Path) -> None:
    told = exo_command.make_directory(tiny, tmp_path, model_id=MODEL, layers="5:7")
    assert f"EXO_MODELS_READ_ONLY_DIRS={tmp_path}" in told
    assert "layers 5:7" in told


@pytest.mark.parametrize("layers", ["5", "5:", "a:b", "5-7", ":7"])
def test_a_range_that_cannot_be_read_is_refused(layers: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="START:END"):
        exo_command.make_directory(tiny, tmp_path, model_id=MODEL, layers=layers)


def test_a_node_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UsageError, match="MACHINE=NODE"):
        exo_command.apply("http://127.0.0.1:9", "PLAN.json", nodes=["studio"])


def test_nobody_at_the_address_is_one_clear_message() -> None:
    with pytest.raises(ExoUnreachableError, match="no exo at the address"):
        exo_command.status("http://127.0.0.1:9")


def test_exos_own_variables_say_where_models_are() -> None:
    found = exo_command.model_directories({"EXO_MODELS_READ_ONLY_DIRS": "/a:/b", "EXO_MODELS_DIRS": "/c"})
    assert [str(path) for path in found[:3]] == ["/a", "/b", "/c"]
    assert len(found) == 4
