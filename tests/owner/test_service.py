"""Services: their files are valid, hold no secret, and start what they say; a child's end, its lines and its signals."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from exo_kimi.cli.app import check_words
from exo_kimi.errors import ExoKimiError, MachineError, UsageError
from exo_kimi.owner import awake
from exo_kimi.owner.awake import awake_command
from exo_kimi.owner.directories import OwnerDirectories
from exo_kimi.owner.service import running
from exo_kimi.owner.service.install import Installation, Services
from exo_kimi.owner.service.manager import Launchd, ServiceManager, Systemd
from exo_kimi.owner.service.running import run_service, wired_note
from exo_kimi.owner.service.spec import ServiceSpec, read_spec
from exo_kimi.owner.service.units import launchd_plist, systemd_unit
from exo_kimi.owner.service_logs import LogQuery, follow_log, read_log

WORDS = ("stage", "--listen", "127.0.0.1:5999")
ODD = 'a "b" \\ $HOME %h ; é'


class System:
    """launchctl and systemctl that remember what they were told."""

    def __init__(self, answer: str = "", status: int = 0) -> None:
        self.calls: list[list[str]] = []
        self.answer, self.status = answer, status

    def __call__(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(words))
        return subprocess.CompletedProcess(list(words), self.status, self.answer, "it says no")


@pytest.fixture
def directories(tmp_path: Path) -> OwnerDirectories:
    return OwnerDirectories(services=tmp_path / "services", logs=tmp_path / "logs", units=tmp_path / "units")


def asked(tmp_path: Path, *words: str, **more: object) -> Installation:
    return Installation(words=words or WORDS, directory=tmp_path, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Launchd, Systemd])
def test_a_service_is_written_started_shown_and_taken_away(
    kind: type[Launchd] | type[Systemd], directories: OwnerDirectories, tmp_path: Path
) -> None:
    answer = "\tstate = running\n\tpid = 77\n\tlast exit code = 1\n"
    if kind is Systemd:
        answer = "ActiveState=active\nSubState=running\nMainPID=77\nExecMainStatus=1\n"
    system = System(answer)
    manager: ServiceManager = kind(directories, system)
    services = Services(directories, manager)
    services.install(asked(tmp_path, variables=("HF_HOME=/models",)), {"PATH": "/bin", "SECRET": "x"})
    spec = read_spec(directories.services, "stage")
    assert (spec.words, spec.environment) == (WORDS, {"PATH": "/bin", "HF_HOME": "/models"})
    for path in (directories.services / "stage.json", manager.unit_path(spec)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert any({"bootstrap", "restart"} & set(call) for call in system.calls)
    (line,) = services.status()
    assert "process 77" in line and "last ended with status 1" in line and "--listen 127.0.0.1:5999" in line
    services.uninstall(services.only(None))
    assert not manager.unit_path(spec).exists()
    assert any({"bootout", "disable"} & set(call) for call in system.calls)
    with pytest.raises(UsageError, match="no service 'stage'"):
        services.uninstall("stage")


def test_a_manager_that_refuses_is_told(directories: OwnerDirectories, tmp_path: Path) -> None:
    services = Services(directories, Launchd(directories, System(status=5)))
    with pytest.raises(MachineError, match=r"(?s)launchctl bootstrap.*status 5.*it says no"):
        services.install(asked(tmp_path), {})


@pytest.mark.parametrize(
    ("words", "variables", "name", "found"),
    [
        (("plan", "x"), (), None, "a command that stays"),
        (("exo", "status"), (), None, "a command that stays"),
        (("serve", "x", "--api-key", "abc"), (), None, "--api-key-file"),
        (("serve", "x", "--api-key=abc"), (), None, "--api-key-file"),
        (WORDS, ("EXO_KIMI_KEY=x",), None, "a secret"),
        (WORDS, ("no",), None, "NAME=VALUE"),
        (WORDS, (), "../x", "not a name"),
        (("serve", "x", "--plan", "gone.json"), (), None, "gone.json"),
    ],
)
def test_what_is_no_service_is_refused_and_nothing_is_written(
    directories: OwnerDirectories,
    tmp_path: Path,
    words: tuple[str, ...],
    variables: tuple[str, ...],
    name: str,
    found: str,
) -> None:
    system = System()
    services = Services(directories, Systemd(directories, system))
    with pytest.raises(ExoKimiError, match=found):
        services.install(asked(tmp_path, *words, variables=variables, name=name), {})
    assert not directories.units.exists() and not directories.services.exists() and system.calls == []


def test_words_are_read_before_they_become_a_service() -> None:
    check_words([*WORDS])
    check_words(["exo", "run", "--", "-v"])
    for wrong in (
        ["stage", "--listen"],
        ["stage", "--lissten", "x"],
        ["serve", "x", "--stages", "two"],
        ["nothing"],
        ["exo"],
    ):
        with pytest.raises(UsageError):
            check_words(wrong)


def test_a_plist_says_what_is_to_run_and_no_word_is_lost(tmp_path: Path) -> None:
    spec = ServiceSpec(name="serve", words=("serve", ODD), directory=f"/models/{ODD}", environment={"A": ODD})
    found = plistlib.loads(launchd_plist(spec, [sys.executable, ODD], tmp_path / ODD))
    assert (found["Label"], found["ProgramArguments"]) == ("exo-kimi.serve", [sys.executable, ODD])
    assert found["WorkingDirectory"] == spec.directory and found["EnvironmentVariables"] == {"A": ODD}
    assert found["RunAtLoad"] is found["KeepAlive"] is True and found["Umask"] == 0o077


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_unit_with_any_words(tmp_path: Path) -> None:
    folder = tmp_path / 'od "d'
    folder.mkdir()
    spec = ServiceSpec(name="serve", words=("serve",), directory=str(tmp_path), environment={"A": ODD})
    unit = tmp_path / "exo-kimi.serve.service"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    for words, expected in (([sys.executable, "-m", ODD], 0), (["/no/such/program"], 1)):
        unit.write_text(systemd_unit(spec, words))
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--user", str(unit)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == expected, checked.stderr
        if not expected:
            assert not [line for line in checked.stderr.splitlines() if "exo-kimi" in line], checked.stderr


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "awake_command", lambda pid: None)


def spec_in(tmp_path: Path, **more: object) -> ServiceSpec:
    return ServiceSpec(name="stage", words=WORDS, directory=str(tmp_path), **more)  # type: ignore[arg-type]


def test_its_lines_its_environment_and_its_status_are_kept(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['A'], os.getcwd()); print('100 % é', file=sys.stderr); sys.exit(7)"
    assert run_service(spec_in(tmp_path, environment={"A": "b"}), tmp_path / "logs", command=child(code)) == 7
    lines = read_log("stage", tmp_path / "logs", LogQuery())
    assert f"b {tmp_path}" in lines and "100 % é" in lines
    assert "process" in lines[0] and lines[-1].endswith("ended with status 7")


def test_a_killed_child_ends_the_service_so_that_it_is_started_again(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_service(spec_in(tmp_path), tmp_path, command=child(code)) == 128 + signal.SIGKILL


def test_a_log_does_not_grow_for_ever_and_is_read_through_its_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "LOG_BYTES", 4000)
    run_service(spec_in(tmp_path), tmp_path, command=child("for i in range(5000): print('line', i)"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log*")) <= 5 * 4000
    lines = read_log("stage", tmp_path, LogQuery(lines=None))
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == list(range(numbers[0], 5000)) and len(numbers) > 500
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in tmp_path.glob("*.log*"))


def test_stopping_a_service_stops_its_child(tmp_path: Path) -> None:
    """As launchd and systemd do: SIGTERM to `service run`, in a home of its own."""
    services = tmp_path / ".config" / "exo-kimi" / "services"
    spec_in(tmp_path).write(services)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")} | {
        "HOME": str(tmp_path)
    }
    process = subprocess.Popen([sys.executable, "-m", "exo_kimi", "service", "run", "stage"], env=environment)
    log = OwnerDirectories.here().logs.relative_to(Path.home())
    path = tmp_path / log / "stage.log"
    until_s = time.monotonic() + 60
    while "waiting for a leader" not in (path.read_text() if path.exists() else ""):
        assert process.poll() is None and time.monotonic() < until_s
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert "ended with status" in path.read_text().splitlines()[-1]
    inner = int(path.read_text().partition("process ")[2].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)


@pytest.mark.parametrize(
    ("wanted", "found", "words"),
    [
        (None, 0, None),
        (1000, None, None),
        (1000, 1000, None),
        (1000, 2000, None),
        (490000, 0, "macOS' default and not 490000 MB.*sudo sysctl iogpu.wired_limit_mb=490000"),
        (490000, 100, "100 MB and not 490000 MB"),
    ],
)
def test_a_lost_wired_limit_is_told_with_the_line_that_mends_it(
    wanted: int | None, found: int | None, words: str | None
) -> None:
    note = wired_note(wanted, found)
    assert note is None if words is None else note is not None and re.search(words, note)


def test_macs_stay_awake_by_caffeinate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert awake_command(7) == ["/usr/bin/caffeinate", "-i", "-s", "-w", "7"]


def test_lines_are_chosen_by_request_and_level_and_followed(tmp_path: Path) -> None:
    (tmp_path / "serve.log.1").write_text("2026-01-01 00:00:00,000 ERROR old\n")
    path = tmp_path / "serve.log"
    path.write_text("2026-01-01 00:00:00,000 INFO req_a\n2026-01-01 00:00:00,000 INFO stage 1: WARNING req_b\n{}\n")
    assert read_log("serve", tmp_path, LogQuery(request="req_a")) == ["2026-01-01 00:00:00,000 INFO req_a"]
    assert len(read_log("serve", tmp_path, LogQuery(level="WARNING"))) == 2
    assert read_log("serve", tmp_path, LogQuery(lines=1)) == ["{}"]
    with pytest.raises(UsageError, match="no such level"):
        LogQuery(level="LOUD")
    with pytest.raises(UsageError, match="no log of 'x'"):
        read_log("x", tmp_path, LogQuery())
    following = follow_log("serve", tmp_path, LogQuery())

    def write() -> None:
        time.sleep(0.2)
        with path.open("a") as stream:
            stream.write("a new line\n")
        time.sleep(0.7)
        path.rename(tmp_path / "serve.log.2")
        path.write_text("after a turn\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert [next(following), next(following)] == ["a new line", "after a turn"]
    writer.join()


def test_a_description_that_was_damaged_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "serve.json").write_text(json.dumps({"name": "serve"}))
    with pytest.raises(UsageError, match="cannot be read"):
        read_spec(tmp_path, "serve")
