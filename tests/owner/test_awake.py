"""A machine that serves is kept awake: for as long as it serves, once, and with a word where nothing can."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exo_kimi.cli import exo_commands
from exo_kimi.owner import awake
from exo_kimi.owner.awake import awake_while_serving, kept_awake
from exo_kimi.owner.service.running import run_service
from exo_kimi.owner.service.spec import ServiceSpec


def sleeper(begun: Path) -> list[str]:
    """Stands in for caffeinate: writes its process' number, then watches."""
    code = "import os, sys, time; open(sys.argv[1] + '.new', 'w').write(str(os.getpid())); "
    code += "os.rename(sys.argv[1] + '.new', sys.argv[1]); time.sleep(600)"
    return [sys.executable, "-c", code, str(begun)]


def pid_in(begun: Path) -> int:
    until_s = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < until_s
        time.sleep(0.02)
    return int(begun.read_text())


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_is_kept_awake_within_the_block_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []

    def command(pid: int) -> list[str]:
        watched.append(pid)
        return sleeper(tmp_path / "pid")

    monkeypatch.setattr(awake, "awake_command", command)
    with awake_while_serving(os.getpid(), already_kept=False, say=pytest.fail):
        pid = pid_in(tmp_path / "pid")
        assert lives(pid) and watched == [os.getpid()]
    assert not lives(pid)


def test_a_service_keeps_it_awake_once_and_its_command_does_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "awake_command", lambda pid: pytest.fail("a second one"))
    with awake_while_serving(os.getpid(), already_kept=True, say=pytest.fail):
        pass
    monkeypatch.setattr(awake, "awake_command", lambda pid: None)
    code = f"import os, sys; sys.exit(7 if {awake.KEPT_ENVIRONMENT_NAME!r} in os.environ else 8)"
    spec = ServiceSpec(name="stage", words=("stage", "--listen", "127.0.0.1:1"), directory=str(tmp_path))
    assert run_service(spec, tmp_path / "logs", command=[sys.executable, "-c", code]) == 7


@pytest.mark.parametrize(("platform", "told"), [("darwin", 1), ("linux", 0)])
def test_where_it_cannot_a_mac_says_so(platform: str, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "awake_command", lambda pid: ["/no/such/caffeinate"])
    monkeypatch.setattr(sys, "platform", platform)
    said: list[str] = []
    with awake_while_serving(os.getpid(), already_kept=False, say=said.append):
        pass
    assert len(said) == told and all("/no/such/caffeinate" in each for each in said)


def test_what_it_says_when_it_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "awake_command", lambda pid: ["sh", "-c", "echo no bus >&2; exit 1"])
    said: list[str] = []
    with kept_awake(os.getpid(), said.append):
        until_s = time.monotonic() + 60
        while not said and time.monotonic() < until_s:
            time.sleep(0.02)
    assert said == ["nothing keeps this machine awake: no bus"]


@pytest.mark.skipif(sys.platform != "linux", reason="systemd-inhibit is Linux'")
def test_what_watches_on_linux_ends_with_the_process(tmp_path: Path) -> None:
    words = awake.awake_command(os.getpid())
    if words is None:
        pytest.skip("no systemd-inhibit here")
    watched = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tail = [word.replace(str(os.getpid()), str(watched.pid)) for word in words[words.index("tail") :]]
    watching = subprocess.Popen(tail)
    watched.kill()
    watched.wait()
    assert watching.wait(60) == 0


@pytest.mark.parametrize("command", ["run", "legacy"])
def test_exo_s_commands_keep_it_awake_too(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(awake.KEPT_ENVIRONMENT_NAME, raising=False)
    monkeypatch.setattr(awake, "awake_command", lambda pid: sleeper(tmp_path / "pid"))
    ran: list[int] = []

    def run(*_: object, **__: object) -> None:
        ran.append(pid_in(tmp_path / "pid"))
        assert lives(ran[0])

    monkeypatch.setattr("exo_kimi.plugin.node.command.run", run)
    monkeypatch.setattr("exo_kimi.plugin.legacy.launch.run", run)
    if command == "run":
        exo_commands.run([])
    else:
        exo_commands.legacy(tmp_path / "plan.json", [])
    assert ran and not lives(ran[0])
