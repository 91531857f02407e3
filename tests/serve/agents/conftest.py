"""The real clients of agents, where they are installed, against the real server over an engine that plays their turns.

`make agents` installs them into `.agents` of the source tree; EXO_KIMI_AGENTS names another folder with their `node_modules`, and
EXO_KIMI_AGENTS_PYTHON another Python that has litellm, openai-agents and pydantic-ai.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exo_kimi.checkpoint.tiny.make import make_tiny

AGENTS = Path(__file__).parents[3] / ".agents"
SERVER = Path(__file__).with_name("scripted_server.py")
ASKED = "Correct the spelling in greeting.txt"
ANSWER = "I corrected greeting.txt."
CLIENT_S = 180


def call(name: str, arguments: Mapping[str, Any], number: int) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
        f"{json.dumps(arguments)}<|tool_call_end|><|tool_calls_section_end|>"
    )


@dataclass
class AgentRun:
    """A folder with a misspelt file, a server that plays the model, and what its client did."""

    folder: Path
    url: str = ""
    output: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "work" / "greeting.txt"

    def run(self, command: Sequence[str], **environment: str) -> None:
        """Run a client in the folder, with a home of its own; it must end with 0."""
        done = subprocess.run(
            list(command),
            cwd=self.file.parent,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
        )
        self.output = done.stdout
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\n{self.log()}"

    @property
    def screenshot(self) -> Path:
        """Beside the file: 280 x 196 pixels, which are 10 x 7 media tokens."""
        path = self.file.with_name("screen.png")
        if not path.exists():
            Image.linear_gradient("L").resize((280, 196)).convert("RGB").save(path)
        return path

    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def prompts(self) -> list[list[int]]:
        return [json.loads(line) for line in (self.folder / "prompts.jsonl").read_text().splitlines()]

    def assert_edited(self) -> None:
        """The file is right, the client said so, no request was refused, and every prompt goes on from the one before."""
        assert self.file.read_text() == "Hello world\n"
        assert ANSWER in self.output
        statuses = [line.split()[-1] for line in self.log().splitlines() if line.startswith("req_")]
        assert len(statuses) >= 3 and set(statuses) == {"200"}, self.log()
        turns = self.prompts()[-3:]
        for before, after in itertools.pairwise(turns):
            assert after[: len(before)] == before, "the prompt of the next turn does not begin with that of the last"


@pytest.fixture(scope="session")
def agents_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("agents") / "kimi", template="k25", vision=True)


@pytest.fixture
def agent(agents_checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., AgentRun]]:
    """`agent((read, arguments), (edit, arguments))`: a server whose model makes these two calls, and then answers."""
    started: list[subprocess.Popen[str]] = []

    def start(read: tuple[str, dict[str, Any]], edit: tuple[str, dict[str, Any]] | None = None) -> AgentRun:
        run = AgentRun(tmp_path)
        for name in ("work", "home"):
            (tmp_path / name).mkdir()
        run.file.write_text("Helo world\n")
        turns = [{"tool": read[0], "says": "I look.</think>I read the file." + call(*read, 0)}]
        if edit is not None:
            turns.append({"tool": edit[0], "says": "A letter is missing.</think>" + call(*edit, 1)})
        turns.append({"tool": read[0], "says": f"It is right.</think>{ANSWER}"})
        text = json.dumps(turns).replace("FILE", str(run.file)).replace("SCREEN", str(run.screenshot))
        (tmp_path / "turns.json").write_text(text)
        with (tmp_path / "server.log").open("w") as log:
            command = [sys.executable, str(SERVER), str(agents_checkpoint), "0", str(tmp_path)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        assert started[0].stdout is not None
        run.url = started[0].stdout.readline().strip()
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        run.environment = {**kept, "HOME": str(tmp_path / "home"), "PWD": str(run.file.parent), "OPENAI_API_KEY": "x"}
        return run

    yield start
    for process in started:
        process.terminate()
        process.wait(15)


@pytest.fixture(scope="session")
def client_named() -> Callable[[str], Path]:
    """`client_named("codex")`: its command, or a skip that says what is missing."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("EXO_KIMI_AGENTS", AGENTS))
        command = folder / "node_modules" / ".bin" / name
        if not command.exists():
            pytest.skip(f"{name} is not installed in {folder} (make agents)")
        return command

    return find


@pytest.fixture(scope="session")
def python_with() -> Callable[..., str]:
    """`python_with("litellm")`: a Python that can import it, or a skip."""

    def find(*modules: str) -> str:
        installed = AGENTS / "python" / "bin" / "python"
        python = os.environ.get("EXO_KIMI_AGENTS_PYTHON", str(installed) if installed.exists() else sys.executable)
        for module in modules:
            probe = subprocess.run(
                [python, "-c", f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"],
                capture_output=True,
            )
            if probe.returncode:
                pytest.skip(f"{python} has no {module}")
        return python

    return find
