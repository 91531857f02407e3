"""`exo-kimi pull` and `exo-kimi share`: plain arguments to a source, a directory and a share."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.names import directory_of, model_of
from exo_kimi.fetch.peer import ShareSource
from exo_kimi.fetch.pull import PullOptions, PullReport, pull
from exo_kimi.fetch.sharing import share
from exo_kimi.fetch.show import shown, summary
from exo_kimi.fetch.source import Source
from exo_kimi.fetch.transfer import CONNECTIONS
from exo_kimi.planner.plan import Plan, read_plan
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, default_key_file, find_key, key_to_listen, require_key


@dataclass(frozen=True, slots=True, kw_only=True)
class PullCommand:
    """What `exo-kimi pull` was told."""

    model: str | None = None
    address: str | None = None
    key_file: Path | None = None
    layers: tuple[int, int] | None = None
    plan: Path | None = None
    machine: str | None = None
    output: Path | None = None
    revision: str | None = None
    whole_files: bool = False
    no_vision: bool = False
    connections: int = CONNECTIONS
    dry_run: bool = False


def pull_command(command: PullCommand) -> str:
    """Fetch, and say what was done.

    Raises:
        UsageError: arguments that contradict each other.
        PlanError: the plan cannot be read, or is of another model.
        FetchError, MachineError, CheckpointError: see `pull`.
    """
    source, directory = _source(command)
    plan, layers = None, command.layers
    if command.plan or command.machine:
        if layers is not None:
            raise UsageError("--layers and --plan both say which layers", fix="give one of them")
        plan, layers = planned_layers(command.plan, command.machine)
    options = PullOptions(
        layers=layers,
        plan=plan,
        no_vision=command.no_vision,
        whole_files=command.whole_files,
        connections=command.connections,
        dry_run=command.dry_run,
    )
    try:
        report = fetch_shown(source, directory, options)
    finally:
        source.close()
    return summary(report, dry_run=command.dry_run)


def _source(command: PullCommand) -> tuple[Source, Path]:
    """Where from, and where to."""
    model = command.model
    if model is not None and model_of(model) is None:
        raise UsageError(
            "this names no model",
            expected="ORG/NAME, and no directory of that name here",
            found=model,
            where="ORG/NAME",
        )
    if model is None and (command.address is None or command.output is None):
        raise UsageError("nothing to fetch", expected="ORG/NAME, or --from ADDR and -o DIR")
    directory = command.output or directory_of(str(model))
    if command.address is None:
        return HubSource(str(model), revision=command.revision), directory
    if command.revision is not None:
        raise UsageError("--revision is for the hub: another machine has what it has", where="--from")
    key = find_key(key_file=command.key_file, environment_text=os.environ.get(ENVIRONMENT_NAME))
    address = parse_address(command.address, option="--from")
    if not address.is_loopback:
        key = require_key(key, address)
    return ShareSource(address, key=key, model=model), directory


def fetch_shown(source: Source, directory: Path, options: PullOptions) -> PullReport:
    """`pull` with its progress on the standard error."""
    return pull(source, directory, options, say=lambda line: print(line, file=sys.stderr, flush=True), watch=shown)


def planned_layers(plan: Path | None, machine: str | None) -> tuple[Plan, tuple[int, int]]:
    """A plan, and the layers that it gives to a machine.

    Raises:
        UsageError: the plan or the machine is missing, or the plan has no such machine.
        PlanError: the plan cannot be read.
    """
    if plan is None or machine is None:
        raise UsageError("--plan and --machine belong together", expected="--plan PLAN.json --machine NAME")
    read = read_plan(plan)
    found = [stage for stage in read.stages if stage.machine == machine]
    if not found:
        names = ", ".join(stage.machine for stage in read.stages)
        raise UsageError("the plan gives no layers to this machine", expected=names, found=machine, where="--machine")
    return read, (found[0].start_layer, found[-1].end_layer)


def share_command(directory: Path, listen: str, *, key_file: Path | None, show_key: bool) -> None:
    """Share a directory until Ctrl-C.

    Args:
        directory: a checkpoint.
        listen: address; on one that other machines reach, a key is needed, and made when there is none.
        key_file: the cluster key's file; written when it does not exist yet.
        show_key: say a key that was made now. Not where the lines go into a log that others may read.

    Raises:
        NotACheckpointError: the directory is none.
        AddressError, UsageError: see `parse_address` and `key_to_listen`; the port is in use.
    """
    address = parse_address(listen, option="--listen", listen=True)
    key, is_new = key_to_listen(address, key_file, os.environ.get(ENVIRONMENT_NAME))

    def announce(bound: Address) -> None:
        print(f"sharing {directory} on {bound} (Ctrl-C stops)", flush=True)
        if is_new:
            print(f"made a new cluster key: {key_file or default_key_file()}", flush=True)
        reachable = Address(socket.gethostname() if bound.is_wildcard else bound.host, bound.port)
        given = ""
        if key is not None and is_new and show_key:
            given = f"{ENVIRONMENT_NAME}={shlex.quote(key.secret.decode())} "
        print(f"on the other machine: {given}exo-kimi pull --from {reachable} -o DIR", flush=True)

    share(directory, address, key=key, announce=announce)
