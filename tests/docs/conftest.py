"""The pages as texts, and a real server of the tiny Kimi for the examples in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest

from exo_kimi.cli.app import command_tree
from exo_kimi.client.demo import shipped_model

ROOT = Path(__file__).parents[2]
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


class CommandLine:
    """What `exo-kimi` understands."""

    def __init__(self) -> None:
        self._root = command_tree()
        sources = sorted((ROOT / "exo_kimi" / "bench").rglob("*.py"))
        self._of_benches = set(OPTION.findall(" ".join(path.read_text(encoding="utf-8") for path in sources)))

    def parse(self, words: Sequence[str]) -> None:
        """Read the words after `exo-kimi` as the command would, without running it; raises what is wrong with them."""
        command, name, rest = self._root, "exo-kimi", list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            name, *rest = rest
            command = command.commands[name]
        command.make_context(name, rest)

    def mistakes(self, words: Sequence[str]) -> list[str]:
        """Commands and options that do not exist, in a line that may have placeholders and `a|b` for two commands."""
        wrong: list[str] = []
        for spelled in product(*(word.split("|") if not word.startswith(("-", "[")) else [word] for word in words[:2])):
            command, path, rest = self._root, [], [*spelled, *words[2:]]
            while rest and rest[0] in getattr(command, "commands", {}):
                command, path = command.commands[rest[0]], [*path, rest.pop(0)]
            if rest and hasattr(command, "commands") and not rest[0].startswith("-"):
                wrong.append(f"no command {' '.join([*path, rest[0]])}")
            known = {"--help", *(name for parameter in command.params for name in parameter.opts)}
            own = rest[: rest.index("--")] if "--" in rest else rest
            if path == ["service", "install"] and (
                inner := [word for word in own if word in ("serve", "stage", "exo")]
            ):
                wrong += self.mistakes(own[own.index(inner[0]) :])  # what it is to start is a line of its own
                own = own[: own.index(inner[0])]
            options = [name for part in own if part.lstrip("[").startswith("-") for name in OPTION.findall(part)]
            known |= self._of_benches if path == ["bench"] else set()  # a bench reads its own options
            wrong += [f"{' '.join(path)} has no {name}" for name in options if name not in known]
        return wrong


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """See the class."""
    return CommandLine()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """`http://127.0.0.1:PORT` of a running `exo-kimi serve` with the shipped model."""
    command = [sys.executable, "-m", "exo_kimi", "serve", str(shipped_model()), "--port", "0"]
    with subprocess.Popen(
        [*command, "--stages", "1", "--dtype", "float32", "--prefix-cache-bytes", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[2] for line in process.stdout if line.startswith("serving at "))
        finally:
            process.terminate()
