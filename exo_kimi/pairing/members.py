"""The machines that this one was paired with, in a file of the user's beside the cluster key."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.text_files import read_bytes
from exo_kimi.errors import UsageError
from exo_kimi.runtime.transport.keys import default_key_file

VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedMachine:
    """Another machine of the cluster.

    Args:
        id: random, of the machine.
        name: what a person calls it; unique here.
        address: where its stage was last; empty where it runs no stage.
        paired: the day, as `2026-11-28`.
    """

    id: str
    name: str
    address: str
    paired: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedMachines:
    """What is remembered.

    Args:
        id: of this machine.
        listen: where this machine's stage listens when not told otherwise; empty where it never was one.
        machines: the others, in the order of their pairing.
    """

    id: str
    listen: str = ""
    machines: tuple[PairedMachine, ...] = ()

    def named(self, name: str) -> PairedMachine | None:
        """The machine of a name."""
        return next((machine for machine in self.machines if machine.name == name), None)

    def with_machine(self, machine: PairedMachine) -> PairedMachines:
        """The same with a machine added, in place of an earlier pairing with it; its name is made unique."""
        others = tuple(each for each in self.machines if each.id != machine.id)
        name, taken = machine.name, {each.name for each in others}
        number = 2
        while name in taken:
            name, number = f"{machine.name}-{number}", number + 1
        return replace(self, machines=(*others, replace(machine, name=name)))

    def without(self, name: str) -> PairedMachines:
        """The same without a machine."""
        return replace(self, machines=tuple(each for each in self.machines if each.name != name))


def members_file() -> Path:
    """Where it is kept."""
    return default_key_file().with_name("cluster.json")


def read_members() -> PairedMachines:
    """What is remembered; nothing where the file is not there.

    Raises:
        UsageError: the file cannot be read.
    """
    path = members_file()
    try:
        raw = json.loads(read_bytes(path, most_bytes=_MOST_BYTES))
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}")
        machines = tuple(_machine(fields) for fields in raw["machines"])
        return PairedMachines(id=str(raw["id"]), listen=str(raw["listen"]), machines=machines)
    except FileNotFoundError:
        return PairedMachines(id=secrets.token_hex(8))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "cannot read which machines were paired", found=error, where=path, fix="delete it and pair again"
        ) from None


def write_members(members: PairedMachines) -> None:
    """Write the file, mode 600, in one step.

    Raises:
        UsageError: it cannot be written.
    """
    path = members_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"version": VERSION, **asdict(members)}, stream, indent=2)
        temporary.replace(path)
    except OSError as error:
        raise UsageError("cannot remember the pairing", found=error.strerror, where=path) from error


def stage_addresses(names: Sequence[str], *, find: Any) -> list[str]:
    """Addresses for what `--stage` was given: an address as it is, a remembered name as where that machine is.

    Args:
        names: addresses and names.
        find: gives the address of a `PairedMachine`.

    Raises:
        UsageError: nothing is remembered under a name.
    """
    addresses = []
    members = read_members() if any(NAME.fullmatch(name) for name in names) else None
    for name in names:
        if members is None or not NAME.fullmatch(name):
            addresses.append(name)
            continue
        machine = members.named(name)
        if machine is None or not machine.address:
            known = ", ".join(each.name for each in members.machines if each.address) or "none"
            raise UsageError(
                f"no stage {name} was paired with this machine",
                expected=f"HOST:PORT, or one of those that were: {known}",
                where="--stage",
                fix="pair it: `exo-kimi stage --pair` there, and here --pair CODE",
            )
        addresses.append(find(machine))
    return addresses


def _machine(fields: Any) -> PairedMachine:
    values = {name: str(fields[name]) for name in ("id", "name", "address", "paired")}
    if not NAME.fullmatch(values["name"]):
        raise ValueError(f"a name {values['name']!a}")
    return PairedMachine(**values)
