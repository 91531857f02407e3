"""What a service runs: its words, its folder and its environment, as a file that its owner alone can read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exo_kimi.errors import UsageError
from exo_kimi.owner.directories import private_folder

KINDS = (("serve",), ("stage",), ("exo", "run"))
SECRETS = ("EXO_KIMI_KEY", "EXO_KIMI_API_KEY")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """One service.

    Args:
        name: of it and of its files.
        words: of `exo-kimi`.
        directory: where it is started: relative paths among the words begin here.
        environment: variables beside those that the service manager gives.
        wired_limit_mb: what `iogpu.wired_limit_mb` is to be on this Mac; None: whatever it is.
    """

    name: str
    words: tuple[str, ...]
    directory: str
    environment: dict[str, str] = field(default_factory=dict)
    wired_limit_mb: int | None = None

    @property
    def label(self) -> str:
        """Its name to launchd and systemd."""
        return f"exo-kimi.{self.name}"

    def write(self, folder: Path) -> Path:
        """Write its file, mode 600; its path."""
        path = private_folder(folder) / f"{self.name}.json"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(self), stream, indent=1)
        return path


def read_spec(folder: Path, name: str) -> ServiceSpec:
    """The description of an installed service.

    Raises:
        UsageError: there is none of this name, or it cannot be read.
    """
    path = folder / f"{check_name(name)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return ServiceSpec(**{**found, "words": tuple(found["words"])})
    except FileNotFoundError:
        names = ", ".join(installed(folder)) or "none"
        raise UsageError(f"no service {name!r} is installed", found=f"installed: {names}") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UsageError("the service's description cannot be read", found=error, where=path) from error


def installed(folder: Path) -> list[str]:
    """Names of the installed services."""
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


def check_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        UsageError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "not a name of a service", expected="small letters, digits and -", found=name[:80], where="--name"
        )
    return name


def kind_of(words: Sequence[str]) -> tuple[str, ...]:
    """Which command it is.

    Raises:
        UsageError: none that stays, or with a key in the sight of every user of this machine.
    """
    found = next((kind for kind in KINDS if tuple(words[: len(kind)]) == kind), None)
    if found is None:
        raise UsageError(
            "a service is a command that stays",
            expected="serve DIR ..., stage --listen ADDR ..., or exo run ...",
            found=" ".join(words)[:200] or "nothing",
        )
    if any(word == "--api-key" or word.startswith("--api-key=") for word in words):
        raise UsageError(
            "an API key would stand in the service's files and in `ps`",
            where="--api-key",
            fix="write it into a file of mode 600 and give --api-key-file FILE",
        )
    return found


def parse_environment(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as variables.

    Raises:
        UsageError: one is not, or is a secret that has a file.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError("not a variable", expected="NAME=VALUE", found=pair[:80], where="--env")
        if name in SECRETS:
            raise UsageError(
                f"{name} is a secret and no variable of a service",
                where="--env",
                fix="give --api-key-file FILE or --key-file FILE among the words",
            )
        found[name] = value
    return found
