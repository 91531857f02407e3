"""`stage --pair`, `serve --pair CODE` and `cluster`: plain arguments to a pairing, and what is remembered of it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from exo_kimi.errors import PairingError, UsageError
from exo_kimi.pairing.code import PairingCode
from exo_kimi.pairing.discovery import announced, answers, find_stages, nearest
from exo_kimi.pairing.members import (
    PairedMachine,
    PairedMachines,
    members_file,
    read_members,
    stage_addresses,
    write_members,
)
from exo_kimi.pairing.serve_side import find_stage, pair_with, parse_pairing
from exo_kimi.pairing.stage_side import Introduction, PairingListener, machine_name
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, ClusterKey, default_key_file, find_key
from exo_kimi.runtime.transport.zmq_link import read_mechanism

DEFAULT_LISTEN = "0.0.0.0:52500"
STARTS_S = 120.0  # a stage imports its frameworks after the pairing
_LOOK_AGAIN_S = 3.0

Say = Callable[[str], None]


def _say(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlace:
    """Where a stage listens, and the file of the key."""

    listen: str
    key_file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedServe:
    """What `serve --pair` and `serve --stage NAME` come down to: stages' addresses, and the file of the key."""

    stages: tuple[str, ...]
    key_file: Path | None


def stage_place(listen: str | None, *, pair: bool, key_file: Path | None) -> StagePlace:
    """Where a stage listens and with which key: as given, else as it was paired; with `pair` it is paired first.

    Raises:
        PairingError, UsageError: see `pair_stage`; nothing was given and nothing is remembered.
    """
    if pair:
        return StagePlace(listen=pair_stage(listen, key_file=key_file), key_file=_key_source(key_file))
    if listen is not None:
        return StagePlace(listen=listen, key_file=key_file)
    known = read_members().listen
    if not known:
        raise UsageError("where is the stage to listen?", fix="--listen HOST:PORT, or --pair, which remembers it")
    return StagePlace(listen=known, key_file=_key_source(key_file))


def pair_stage(listen: str | None, *, key_file: Path | None, say: Say = _say) -> str:
    """Show a code and wait for the machine where it is typed; returns the address to listen on from then on.

    Args:
        listen: where; the remembered address, or port 52500 on every interface, when not given.
        key_file: of the cluster key; written when it does not exist yet.
        say: takes lines for the user.

    Raises:
        PairingError: three wrong codes, or nobody came.
        AddressError, UsageError: the address or the key file cannot be used.
    """
    members = read_members()
    address = parse_address(listen or members.listen or DEFAULT_LISTEN, option="--listen", listen=True)
    if address.path is not None:
        raise UsageError("a socket file is for this machine only", where=f"--listen {address}")
    key = _own_key(key_file)
    code = PairingCode.generate()
    own = Introduction(id=members.id, name=machine_name())

    async def wait() -> tuple[ClusterKey, Introduction, Address]:
        listener = PairingListener(code, key, own)
        server = await listener.open(address)
        bound = Address(address.host, server.sockets[0].getsockname()[1])
        with ExitStack() as stack:
            # In a thread: zeroconf would make this loop its own, and then wait for it.
            told = await asyncio.to_thread(stack.enter_context, announced(own.id, own.name, bound, plate=code.plate))
            say(f"pairing code: {code}")
            host = own.name if bound.is_wildcard else bound.host
            by_hand = "" if told else f"@{Address(host, bound.port)}"
            say(f"on the other machine: exo-kimi serve DIR --pair {code}{by_hand}")
            found, other = await listener.wait(server)
            await asyncio.to_thread(stack.close)
        return found, other, bound

    found, other, bound = asyncio.run(wait())
    if key is None:
        found.write(key_file or default_key_file())
    _remember(replace(members, listen=str(bound)), other, address="")
    say(f"paired with {other.name or 'the other machine'}")
    return str(bound)


@contextmanager
def announced_stage(listen: str) -> Iterator[None]:
    """Announce a stage that was paired, so that it is found again when its address has changed."""
    members = read_members()
    address = parse_address(listen, option="--listen", listen=True)
    if not members.machines or address.is_loopback or not address.port:
        yield
        return
    with announced(members.id, machine_name(), address):
        yield


def pair_serve(text: str, *, key_file: Path | None, say: Say = _say) -> str:
    """Pair with the stage that shows a code; returns its address once its stage answers there.

    Args:
        text: `CODE` or `CODE@HOST:PORT`.
        key_file: of the cluster key; written when it does not exist yet.
        say: takes lines for the user.

    Raises:
        PairingError: see `find_stage` and `pair_with`; the stage does not start.
        UsageError: the text or the key file cannot be used, or the machines are of different clusters.
    """
    code, address = parse_pairing(text)
    address = address or find_stage(code)
    members, key = read_members(), _own_key(key_file)
    own = Introduction(id=members.id, name=machine_name())
    found, other = asyncio.run(pair_with(address, code, key=key, own=own))
    if key is None:
        found.write(key_file or default_key_file())
    _remember(members, other, address=str(address))
    say(f"paired with {other.name or 'the stage'} at {address}: --stage {_name_of(other)} from now on")
    asyncio.run(_wait_for_stage(address))
    return str(address)


def paired_serve(stages: Sequence[str], pair: str | None, *, key_file: Path | None) -> PairedServe:
    """The addresses of `--stage`, names among them, and behind them the stage of `--pair`.

    Raises:
        PairingError, UsageError: see `pair_serve` and `stage_addresses`.
    """
    found = tuple(stage_addresses(stages, find=_where))
    is_paired = pair is not None or found != tuple(stages)
    if pair is not None:
        found = (*found, pair_serve(pair, key_file=key_file))
    return PairedServe(stages=found, key_file=_key_source(key_file) if is_paired else key_file)


def cluster_status() -> str:
    """What this machine remembers, and which of it answers now."""
    members, key = read_members(), _own_key(None)
    lines = [f"this machine  {machine_name()}" + (f", stage at {members.listen}" if members.listen else "")]
    if key is None:
        lines.append("cluster key   none: `exo-kimi stage --pair` makes one")
    else:
        source = ENVIRONMENT_NAME if os.environ.get(ENVIRONMENT_NAME) else str(default_key_file())
        lines.append(f"cluster key   {key.public.decode()[:8]} (its public half), from {source}")
    for machine in members.machines:
        state = "serves" if not machine.address else f"stage at {machine.address}"
        if machine.address:
            state += ", answers" if answers(parse_address(machine.address, option="--stage")) else ", does not answer"
        lines.append(f"paired        {machine.name}: {state} (since {machine.paired})")
    if not members.machines:
        lines.append("paired        with nobody")
    return "\n".join(lines)


def cluster_forget(name: str | None) -> str:
    """Forget one machine, or all and the key.

    Raises:
        UsageError: no machine of this name is remembered, or a file cannot be removed.
    """
    members = read_members()
    if name is not None:
        if members.named(name) is None:
            known = ", ".join(machine.name for machine in members.machines) or "none"
            raise UsageError("no machine of this name was paired", expected=known, found=name)
        write_members(members.without(name))
        return f"forgot {name}, which still holds the cluster key; for a new one forget all on every machine and pair again"
    for path in (members_file(), default_key_file()):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError("cannot remove the file", found=error.strerror, where=path) from error
    return f"forgot {len(members.machines)} machines and the cluster key; the others still hold it"


def _own_key(key_file: Path | None) -> ClusterKey | None:
    """The key that this machine has; None where it has none, or `--key-file` names a file that is to be made."""
    given = key_file if key_file is None or key_file.exists() else None
    if key_file is not None and given is None:
        return None
    return find_key(key_file=given, environment_text=os.environ.get(ENVIRONMENT_NAME))


def _key_source(key_file: Path | None) -> Path | None:
    """The file of the key, named although it is the usual one: paired machines use it between processes of one machine too."""
    return key_file or (None if os.environ.get(ENVIRONMENT_NAME) else default_key_file())


def _remember(members: PairedMachines, other: Introduction, *, address: str) -> None:
    today = time.strftime("%Y-%m-%d")
    machine = PairedMachine(id=other.id, name=_name_of(other), address=address, paired=today)
    write_members(members.with_machine(machine))


def _name_of(other: Introduction) -> str:
    safe = "".join(each for each in other.name if each.isascii() and (each.isalnum() or each in "-_")).strip("-_")
    return safe or "mac"


def _where(machine: PairedMachine) -> str:
    """Where a remembered stage is now: at its address, or where it is announced."""
    if answers(parse_address(machine.address, option="--stage")):
        return machine.address
    try:
        found = find_stages(id=machine.id, find_s=_LOOK_AGAIN_S)
    except PairingError:
        found = []
    address = nearest(found[0]) if len(found) == 1 else None
    if address is None:
        return machine.address  # the error of the link says more
    members = read_members()
    write_members(members.with_machine(replace(machine, address=str(address))))
    print(f"{machine.name} is at {address} now", file=sys.stderr, flush=True)
    return str(address)


async def _wait_for_stage(address: Address) -> None:
    until_s = time.monotonic() + STARTS_S
    while time.monotonic() < until_s:
        if await read_mechanism(address) == "CURVE":
            return
        await asyncio.sleep(0.2)
    raise PairingError(
        "the pairing is done, but no stage answers there",
        where=address,
        fix="look at the terminal of `exo-kimi stage --pair` there",
    )
