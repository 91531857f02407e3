"""The unit that `service install` writes, run by a real systemd: started, killed, killed again, after a login, and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.owner.user_systemd import UserSystemd, user_systemd

EXO_KIMI = [sys.executable, "-m", "exo_kimi"]
REPOSITORY = Path(__file__).parents[2]
ODD = 'a "b" \\ $HOME %h ; é'


def wait_for(found: Callable[[], object], what: str) -> None:
    until_s = time.monotonic() + 90
    while not found():
        assert time.monotonic() < until_s, what
        time.sleep(0.1)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Installed:
    """The service as its user sees it."""

    def __init__(self, user: UserSystemd) -> None:
        self.user = user

    def exo_kimi(self, *words: str, cwd: Path | None = None) -> str:
        done = self.user.run([*EXO_KIMI, *words], cwd=cwd or REPOSITORY)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self) -> str:
        paths = list(self.user.home.rglob("stage.log"))
        return paths[0].read_text() if paths else ""

    def starts(self) -> int:
        return self.log().count("waiting for a leader")

    def processes(self) -> tuple[int, int]:
        """Of `service run`, which systemd started, and of the command within."""
        state = self.exo_kimi("service", "status")
        outer = re.search(r"active \(running\), process (\d+)", state)
        inner = re.findall(r"process (\d+)", self.log())
        assert outer is not None, state
        return int(outer[1]), int(inner[-1])

    def property_of(self, name: str) -> str:
        done = self.user.run(["systemctl", "--user", "show", "exo-kimi.stage.service", "-p", name, "--value"])
        return done.stdout.strip()


@pytest.mark.timeout(300)
def test_a_service_starts_survives_kill_9_starts_with_a_login_and_stops_cleanly() -> None:
    with user_systemd() as user, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        installed, folder = Installed(user), user.root / "od d %h"
        folder.mkdir()
        quick = user.home / ".config" / "systemd" / "user" / "exo-kimi.stage.service.d" / "quick.conf"
        quick.parent.mkdir(parents=True)
        quick.write_text("[Service]\nRestartSec=100ms\n")  # of all that the unit says, this alone is not waited for
        words = ["stage", "--listen", f"127.0.0.1:{port}"]
        variables = ["--env", f"PYTHONPATH={REPOSITORY}", "--env", f"ODD={ODD}"]
        assert "started" in installed.exo_kimi("service", "install", *variables, *words, cwd=folder)
        wait_for(lambda: installed.starts() == 1, "it does not start")
        outer, inner = installed.processes()
        assert Path(f"/proc/{inner}/cwd").resolve() == folder
        assert f"ODD={ODD}".encode() in Path(f"/proc/{inner}/environ").read_bytes().split(b"\0")
        os.kill(outer, signal.SIGKILL)
        wait_for(lambda: installed.starts() == 2, "it does not start again")
        assert not lives(inner) and not lives(outer), "nothing of it stays behind"
        outer, inner = installed.processes()
        os.kill(inner, signal.SIGKILL)
        wait_for(lambda: installed.starts() == 3, "it does not start again after its command was killed")
        assert not lives(inner) and not lives(outer)
        assert installed.property_of("NRestarts") == "2"
        outer, inner = installed.processes()
        user.logout()
        assert not lives(inner) and not lives(outer)
        user.login()
        wait_for(lambda: installed.starts() == 4, "it does not start with a login")
        outer, inner = installed.processes()
        user.run(["systemctl", "--user", "stop", "exo-kimi.stage.service"])
        assert (installed.property_of("ActiveState"), installed.property_of("Result")) == ("inactive", "success")
        assert not lives(inner) and not lives(outer)
        assert "gone; its logs stay" in installed.exo_kimi("service", "uninstall")
        assert "no service is installed" in installed.exo_kimi("service", "status")
        assert installed.property_of("UnitFileState") == ""
