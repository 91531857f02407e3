"""examples/ works: the agent against a real server, the files read by what reads them, the check of a layer run."""

from __future__ import annotations

import contextlib
import io
import plistlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exo_kimi import cli
from exo_kimi.client.demo import shipped_model

CommandLine = Any  # see conftest


def run(root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """An example as a user runs it."""
    command = [sys.executable, str(root / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)


def test_the_agent_calls_its_tool_and_answers_from_it(root: Path, server_url: str) -> None:
    ended = run(root, "agent.py", "--url", f"{server_url}/v1")
    assert ended.returncode == 0, ended.stderr
    call, answer = ended.stdout.splitlines()
    assert call == 'get_weather({"city": "Oslo"}) -> {"sky": "rain", "degrees": 7}'
    assert answer == "In Oslo it is 7 degrees, rain."


def test_a_layer_is_checked_alone(root: Path) -> None:
    ended = run(root, "check_one_layer.py", shipped_model(), 3)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "good"


def test_plan_reads_the_cluster(root: Path) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        cluster = root / "examples" / "cluster.toml"
        assert cli.main(["plan", "--model", "kimi-k2.6", "--recipe", "q34+q6", "--cluster", str(cluster)]) == 0
    assert "studio  layers 0:44 (44)" in shown.getvalue()
    assert "mini  layers 44:61 (17)" in shown.getvalue()


@pytest.mark.parametrize("command", ["serve", "stage"])
def test_launchd_starts_a_command_that_exists(root: Path, command: str, command_line: CommandLine) -> None:
    job = plistlib.loads((root / "examples" / "launchd" / f"exo-kimi-{command}.plist").read_bytes())
    assert job["Label"] == f"exo-kimi.{command}"
    assert job["RunAtLoad"] is job["KeepAlive"] is True
    awake, option, program, *arguments = job["ProgramArguments"]
    assert (Path(awake).name, option, Path(program).name) == ("caffeinate", "-s", "exo-kimi")
    assert arguments[0] == command
    command_line.parse(arguments)


def test_every_example_is_in_the_list(root: Path) -> None:
    folder = root / "examples"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert [
        name for name in files if name != "README.md" and "__pycache__" not in name and f"({name})" not in listed
    ] == []
