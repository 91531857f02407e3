"""The pages as texts, and a real server of the tiny Kimi for the examples in them."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from exo_kimi import cli
from exo_kimi.client.demo import shipped_model

ROOT = Path(__file__).parents[2]
GROUPS = ("exo", "train")
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


class CommandLine:
    """What `exo-kimi` understands, read from its own help, so that any parser may be behind it."""

    def __init__(self) -> None:
        self._help: dict[tuple[str, ...], str] = {}

    def help(self, *words: str) -> str:
        """The help of a command, or an empty text when there is none."""
        if words not in self._help:
            self._help[words] = self._ask(words)
        return self._help[words]

    @staticmethod
    def _ask(words: tuple[str, ...]) -> str:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
            try:
                status = cli.main([*words, "--help"])
            except SystemExit as leaving:
                status = int(leaving.code or 0)
        return "" if status else shown.getvalue()

    def mistakes(self, arguments: Sequence[str]) -> list[str]:
        """What is wrong with the words after `exo-kimi`: a command or an option that does not exist."""
        count = 2 if arguments[:1] and arguments[0] in GROUPS and len(arguments) > 1 else 1
        words, rest = arguments[:count], list(arguments[count:])
        if words[0].startswith("-"):
            words, rest = [], list(arguments)
        wrong = []
        for names in self._spelled_out(words):
            text = self.help(*names)
            known = set(OPTION.findall(text))
            own = rest[: rest.index("--")] if "--" in rest else rest
            if names[:1] == ["bench"]:  # a bench reads its own options
                sources = (ROOT / "exo_kimi" / "bench").rglob("*.py")
                known |= set(OPTION.findall(" ".join(path.read_text(encoding="utf-8") for path in sources)))
            options = [
                found
                for part in own
                for found in OPTION.findall(part.partition("=")[0])
                if part.lstrip("[").startswith("-")
            ]
            wrong += [f"no command {' '.join(names)}"] * (not text)
            wrong += [f"{' '.join(names)} has no {option}" for option in options if text and option not in known]
        return wrong

    @staticmethod
    def _spelled_out(words: Sequence[str]) -> list[list[str]]:
        """`exo status|plan` as `exo status` and `exo plan`; group itself for its bare name."""
        spelled: list[list[str]] = [[]]
        for word in words:
            spelled = [[*names, choice] for names in spelled for choice in word.split("|")]
        return spelled


@pytest.fixture(scope="session")
def command_line() -> Iterator[CommandLine]:
    """See the class; help is wide, so that no option is cut."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "TERMINAL_WIDTH"):
            patch.setenv(name, "250")
        patch.setenv("NO_COLOR", "1")
        yield CommandLine()


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
