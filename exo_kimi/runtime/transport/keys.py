"""The cluster key: one secret that every member holds, from which both ends' CURVE keys come.

A file with the key is readable by its owner only, so that a machine's other users cannot join.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq
from zmq.utils import z85

from exo_kimi.errors import KeyMismatchError, UsageError
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.secret_files import read_secret

ENVIRONMENT_NAME = "EXO_KIMI_KEY"
_KEY_CHARACTERS = 40
_HOW = f"give the stage's key with --key-file FILE or in the environment as {ENVIRONMENT_NAME}"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """A CURVE key pair in Z85, 40 characters each. The secret is never printed by repr.

    `explicit` is False for a key that nobody asked for, found in the default file: it is for other machines only, while one
    that was given is used on loopback too.
    """

    secret: bytes = field(repr=False)
    public: bytes
    explicit: bool = field(default=True, compare=False)

    def for_loopback(self, loopback: bool) -> ClusterKey | None:
        """The key to use at an address."""
        return self if self.explicit or not loopback else None

    @classmethod
    def generate(cls) -> ClusterKey:
        """A new random key."""
        public, secret = zmq.curve_keypair()
        return cls(secret=secret, public=public)

    @classmethod
    def from_text(cls, text: str, *, where: object) -> ClusterKey:
        """Read a key as `generate` makes them.

        Raises:
            UsageError: it is not 40 characters of Z85.
        """
        secret = text.strip().encode("ascii", errors="replace")
        try:
            if len(secret) != _KEY_CHARACTERS:
                raise ValueError(f"{len(secret)} characters")
            z85.decode(secret)
            return cls(secret=secret, public=zmq.curve_public(secret))
        except (ValueError, KeyError, ArithmeticError, zmq.ZMQError) as error:
            raise UsageError(
                "cannot read the cluster key",
                expected=f"{_KEY_CHARACTERS} characters of Z85, as `exo-kimi stage` prints them",
                found=f"{len(secret)} characters",
                where=where,
                fix=_HOW,
            ) from error

    @classmethod
    def read(cls, path: Path) -> ClusterKey:
        """Read a key file.

        Raises:
            UsageError: it cannot be read, holds no key, or others may read it too.
        """
        return cls.from_text(read_secret(path, fix=_HOW), where=path)

    def write(self, path: Path) -> None:
        """Write a new key file with mode 600; an existing one is never replaced.

        Raises:
            UsageError: the file exists or cannot be made.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self.secret + b"\n")
        except OSError as error:
            raise UsageError("cannot write the key file", found=error.strerror, where=path) from error


def default_key_file() -> Path:
    """Where a machine keeps its key unless told otherwise."""
    return Path.home() / ".config" / "exo-kimi" / "cluster.key"


def find_key(*, key_file: Path | None, environment_text: str | None) -> ClusterKey | None:
    """The key that a member was given: `--key-file`, else the environment, else the default file if there is one.

    Raises:
        UsageError: a source is there but holds no usable key.
    """
    if key_file is not None:
        return ClusterKey.read(key_file)
    if environment_text:
        return ClusterKey.from_text(environment_text, where=ENVIRONMENT_NAME)
    path = default_key_file()
    return replace(ClusterKey.read(path), explicit=False) if path.exists() else None


def key_to_listen(
    address: Address, key_file: Path | None, environment_key: str | None
) -> tuple[ClusterKey | None, bool]:
    """The key of a listener, and whether it was made now. Loopback needs none, but keeps one that was given on purpose.

    Raises:
        UsageError: a source is there but holds no usable key, or a new one cannot be written.
    """
    given = key_file is not None and key_file.exists()
    if given or environment_key:
        return find_key(key_file=key_file if given else None, environment_text=environment_key), False
    if address.is_loopback and key_file is None:
        return None, False
    path = key_file or default_key_file()
    if path.exists():
        return ClusterKey.read(path), False
    key = ClusterKey.generate()
    key.write(path)
    return key, True


def require_key(key: ClusterKey | None, address: object) -> ClusterKey:
    """The key for an address that is not loopback.

    Raises:
        KeyMismatchError: there is none.
    """
    if key is None:
        raise KeyMismatchError(
            "a stage on another machine needs the cluster key", expected="a key", found="none", where=address, fix=_HOW
        )
    return key
