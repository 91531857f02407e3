"""Where files are fetched from: what it has, and byte ranges of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

_TEXTS = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "THIRD_PARTY")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as its source describes it.

    Args:
        name: in the checkpoint directory, without folders.
        size: bytes of the whole file.
        sha256: of the whole file, in hexadecimal; None where it is not known.
        git_sha1: git's hash of a small file, which stands for its content where there is no SHA-256.
        held: byte ranges of the whole file that the source has, ascending and apart; None where it has all.
    """

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    held: tuple[tuple[int, int], ...] | None = None

    def holds(self, start: int, end: int) -> bool:
        """Whether the source has all of the bytes [start, end)."""
        return self.held is None or any(first <= start and end <= last for first, last in self.held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A model's files at one moment.

    Args:
        model: its name.
        revision: equal revisions have equal files: the hub's commit, or a hash.
        files: by name.
        where: the source in words, for messages.
    """

    model: str
    revision: str
    files: Mapping[str, RemoteFile]
    where: str


class Source(Protocol):
    """A place that has a model's files. Its methods may be called from several threads."""

    def listing(self) -> Listing:
        """What it has. Raises FetchError."""
        ...

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes | memoryview]:
        """The bytes [start, end) of a whole file, in pieces as they come; each lasts until the next one is asked for.

        Raises:
            TryAgainError: it may work later, from the byte after the last one that came.
            FetchError: it will not.
        """
        ...

    def digest(self, file: RemoteFile, ranges: tuple[tuple[int, int], ...]) -> str | None:
        """SHA-256 of some ranges one after another, as the source has them; None where it cannot say. Raises like `read`."""
        ...

    def close(self) -> None:
        """End its connections; idempotent."""
        ...


def is_wanted(name: str) -> bool:
    """Weights and texts in the top folder. No code, no pickles, no pictures, nothing whose name leads elsewhere."""
    if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable() or len(name) > 200:
        return False
    return name.endswith((".safetensors", *_TEXTS)) or name.upper().startswith(_LEGAL)


class TryAgainError(Exception):
    """Raised inside this room when a source failed in a way that may pass.

    Args:
        reason: in words.
        wait_s: how long it asked to be left alone; None where it did not say.
    """

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s
