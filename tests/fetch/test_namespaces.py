"""Share and pull, and pairing, between two network namespaces: the commands as two people type them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Machine, TwoMachines, two_machines

from exo_kimi.runtime.transport.keys import ClusterKey

RUN = [sys.executable, "-m", "exo_kimi"]
ASK = """
import json, sys, urllib.request
body = {"model": "kimi", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
url = sys.argv[1] + "/v1/chat/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).status)
"""


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[TwoMachines]:
    with two_machines(tmp_path / "machines") as machines:
        yield machines


@pytest.fixture
def slow_cable(tmp_path: Path) -> Iterator[TwoMachines]:
    with two_machines(tmp_path / "machines", rate="4mbit") as machines:
        yield machines


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def until(process: subprocess.Popen[str], text: str) -> str:
    """The line with a text in it; everything that was said, where the process ended without."""
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if text in line:
            return line
    raise AssertionError("".join(said))


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(60)


def came(directory: Path) -> int:
    """Bytes on the disk of files that are still to become others."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*.part"))


def wait_for(pull: subprocess.Popen[str], directory: Path, at_least: int) -> None:
    """Until so much of a pull has come; the cable is so slow that it cannot end before this is seen."""
    while came(directory) < at_least:
        assert pull.poll() is None, pull.communicate()[0]
        time.sleep(0.01)


def test_a_share_crosses_the_cable_through_kills_and_a_pulled_plug(
    slow_cable: TwoMachines, whole: Path, tmp_path: Path
) -> None:
    here, there = slow_cable.one, slow_cable.other
    got, size = tmp_path / "got", sum(map(len, files(whole).values()))
    key = ClusterKey.generate().secret.decode()
    listen = f"{there.host}:52510"
    share = there.start([*RUN, "share", str(whole), "--listen", listen], EXO_KIMI_KEY=key)
    until(share, "sharing")
    pull = [*RUN, "pull", "--from", listen, "-o", str(got)]
    try:
        refused = here.start(pull, EXO_KIMI_KEY=ClusterKey.generate().secret.decode())
        assert "holds another cluster key" in refused.communicate(timeout=120)[0]
        assert refused.returncode == 2 and not got.exists()

        killed = here.start(pull, EXO_KIMI_KEY=key)
        wait_for(killed, got, 900_000)
        killed.kill()
        killed.wait()
        kept = came(got)
        assert kept < size / 2 and not (got / "model.safetensors.index.json").exists()

        going_on = here.start(pull, EXO_KIMI_KEY=key)
        left = until(going_on, "to fetch")
        assert float(left.split()[0]) < (size - 800_000) / 2**20, left
        wait_for(going_on, got, kept + 300_000)
        there.plug("down")
        assert going_on.poll() is None
        time.sleep(0.5)
        there.plug("up")
        slow_cable.shape(None)
        said = going_on.communicate(timeout=240)[0]
        assert going_on.returncode == 0, said
        assert files(got) == files(whole)
    finally:
        stop(share)


def test_a_model_that_is_being_shared_answers_meanwhile(slow_cable: TwoMachines, whole: Path, tmp_path: Path) -> None:
    here, there = slow_cable.one, slow_cable.other
    slow_cable.shape("500kbit")
    key, listen = ClusterKey.generate().secret.decode(), f"{there.host}:52510"
    share = there.start([*RUN, "share", str(whole), "--listen", listen], EXO_KIMI_KEY=key)
    until(share, "sharing")
    pull = here.start([*RUN, "pull", "--from", listen, "-o", str(tmp_path / "got")], EXO_KIMI_KEY=key)
    try:
        wait_for(pull, tmp_path / "got", 1)
        serve(there, [str(whole), "--dtype", "float32", "--kv-bytes", "20MB", "--port", "0"])
        assert pull.poll() is None
        slow_cable.shape(None)
        assert pull.wait(240) == 0
        assert files(tmp_path / "got") == files(whole)
    finally:
        pull.kill()
        stop(share)


def test_two_machines_pair_by_one_code_and_serve(cable: TwoMachines, whole: Path) -> None:
    """Found by Bonjour: no key and no address is typed."""
    here, there = cable.one, cable.other
    stage = there.start([*RUN, "stage", "--pair", "--model", str(whole)])
    try:
        code = until(stage, "pairing code").split()[-1]
        wrong = f"{code[:-1]}{(int(code[-1]) + 1) % 10}"
        refused = here.start([*RUN, "serve", str(whole), "--pair", wrong])
        assert "another one than the stage shows" in refused.communicate(timeout=60)[0]
        options = [str(whole), "--split", "3,4", "--dtype", "float32", "--kv-bytes", "20MB", "--port", "0"]
        serve(here, [*options, "--pair", code])
        keys = [end.home / ".config" / "exo-kimi" / "cluster.key" for end in (here, there)]
        assert keys[0].read_bytes() == keys[1].read_bytes()
        assert [oct(path.stat().st_mode & 0o777) for path in keys] == ["0o600", "0o600"]
        status = here.start([*RUN, "cluster", "status"]).communicate(timeout=60)[0]
        assert f"stage at {there.host}:52500, answers" in status
    finally:
        stop(stage)


def serve(here: Machine, options: list[str]) -> None:
    """Start a server there, and ask it something."""
    server = here.start([*RUN, "serve", *options])
    try:
        url = until(server, "serving at").split()[2]
        asked = here.start([sys.executable, "-c", ASK, url])
        assert asked.communicate(timeout=90)[0].strip() == "200"
    finally:
        stop(server)
