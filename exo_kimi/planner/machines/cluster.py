"""A cluster: its machines and the links between them, from an inline list or cluster.toml.

[[machine]]
name = "studio"            # default: chip and memory
chip = "m3-ultra"          # or profile = "studio.toml", as `exo-kimi machine --measure -o` writes it
memory = "512GiB"
# gpu_cores = 60           # where the chip is sold with several numbers of them
limit = "480GiB"           # the wired limit that is set, also as iogpu.wired_limit_mb has it; 0 or none: Apple's default
# bandwidth_bytes_per_s, prefill_flops_per_s, attention_flops_per_s, overhead_per_layer_s, ssd_bytes_per_s: override the profile

[[link]]
between = ["studio", "mini"]
kind = "thunderbolt4"      # or latency_s and bandwidth_bytes_per_s, measured, and handover_s
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.errors import UsageError
from exo_kimi.planner import data
from exo_kimi.planner.machines.hardware import (
    MOST_QUOTED,
    Machine,
    Value,
    check_limit,
    machine_of_chip,
    machine_of_name,
    machine_of_profile,
    positive,
)
from exo_kimi.units import GIB, parse_bytes

MOST_MACHINES = 8
MIB = 1 << 20
_COUNTED = re.compile(r"(\d+)\s*[x*×]\s*(.*)")
_OVERRIDES = {
    "bandwidth_bytes_per_s": "bandwidth",
    "prefill_flops_per_s": "prefill",
    "attention_flops_per_s": "attention",
    "overhead_per_layer_s": "overhead",
    "ssd_bytes_per_s": "ssd",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLink:
    """A way between two machines.

    Args:
        kind: what it is.
        latency_s: seconds one way for a small message.
        bandwidth_bytes_per_s: of a long one.
        source: of these.
        handover_s: by which a step is longer because one machine's GPU waits for the other's, beside the message itself. Source:
            mlx-lm's pipeline over two M3 Ultra, `planner/published/`.
        warning: shown with every plan over it.
    """

    kind: str
    latency_s: float
    bandwidth_bytes_per_s: float
    source: str
    handover_s: float = 0.0
    warning: str = ""

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds for a message: latency + bytes / bandwidth."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines sorted by name, and the links that were given; any other pair has the best link that both support."""

    machines: tuple[Machine, ...]
    links: Mapping[frozenset[str], NetworkLink]

    def link(self, one: Machine, other: Machine) -> NetworkLink:
        """The link between two machines: as given, else the Thunderbolt that both have, else 10 Gb/s Ethernet."""
        given = self.links.get(frozenset((one.name, other.name)))
        if given is not None:
            return given
        version = min(one.thunderbolt, other.thunderbolt)
        return link_of_kind(f"thunderbolt{version}" if version >= 3 else "ethernet10")

    def with_raised_limits(self) -> Cluster:
        """The same cluster with every wired limit at its ceiling."""
        return replace(self, machines=tuple(machine.with_raised_limit() for machine in self.machines))

    def with_ssd(self, bytes_per_s: float) -> Cluster:
        """The cluster with a declared speed of every disk that was neither measured nor set by the machine's own entry."""
        value = Value(number=bytes_per_s, source="--ssd", status="set")
        known = [m.ssd is not None and m.ssd.status in ("measured", "set") for m in self.machines]
        machines = (m if own else replace(m, ssd=value) for m, own in zip(self.machines, known, strict=True))
        return replace(self, machines=tuple(machines))

    def without(self, *names: str) -> Cluster:
        """The cluster without some machines."""
        return replace(self, machines=tuple(machine for machine in self.machines if machine.name not in names))

    def with_machine(self, machine: Machine) -> Cluster:
        """The cluster with one machine more."""
        names = {other.name for other in self.machines}
        free = (f"{machine.name}-{count}" for count in range(2, MOST_MACHINES + 2))
        name = machine.name if machine.name not in names else next(name for name in free if name not in names)
        return make_cluster([*self.machines, replace(machine, name=name)], self.links)


def link_of_kind(kind: str) -> NetworkLink:
    """A declared link.

    Raises:
        UsageError: no link of that kind.
    """
    table = data.load("profiles", "links")
    if kind not in table:
        raise UsageError("unknown link", expected=f"one of {', '.join(table)}", found=repr(kind)[:MOST_QUOTED])
    return NetworkLink(kind=kind, **table[kind])


def make_cluster(machines: list[Machine], links: Mapping[frozenset[str], NetworkLink] | None = None) -> Cluster:
    """Machines in one order whatever the order given; equal names get -2, -3, ...

    Raises:
        UsageError: no machine, or more than the exact solver takes.
    """
    if not 1 <= len(machines) <= MOST_MACHINES:
        raise _too_many(len(machines))
    named: dict[str, Machine] = {}
    for machine in sorted(machines, key=lambda machine: (machine.name, machine.kind)):
        name, count = machine.name, 1
        while name in named:
            count += 1
            name = f"{machine.name}-{count}"
        named[name] = replace(machine, name=name)
    return Cluster(machines=tuple(named[name] for name in sorted(named)), links=dict(links or {}))


def read_cluster(text: str | Path) -> Cluster:
    """A cluster from `m3-ultra-512, m2-ultra-192`, from `2x m3-ultra-512`, or from a .toml file.

    Raises:
        UsageError: a machine, a link or the file cannot be read.
    """
    if str(text).endswith(".toml"):
        path = Path(text)
        return parse_cluster(data.read(path, "cluster"), where=path)
    machines: list[Machine] = []
    for part in str(text).split(","):
        counted = _COUNTED.fullmatch(part.strip())
        count = 1 if counted is None else int(counted[1][:9])
        if not 1 <= count <= MOST_MACHINES:
            raise _too_many(repr(part.strip())[:MOST_QUOTED])
        if counted is not None and not counted[2].strip():
            raise UsageError(
                "a number of machines without a machine",
                expected=f"as in {count}x m3-ultra-512",
                found=repr(part.strip())[:MOST_QUOTED],
                where="--cluster",
            )
        machines += [machine_of_name(counted[2] if counted else part)] * count
    return make_cluster(machines)


def _too_many(found: object) -> UsageError:
    return UsageError(
        f"a cluster has 1 to {MOST_MACHINES} machines",
        expected=f"1 to {MOST_MACHINES}, as in 2x m3-ultra-512",
        found=found,
        where="--cluster",
    )


def parse_cluster(table: Mapping[str, Any], *, where: Path) -> Cluster:
    """A cluster from the table of a cluster.toml; profiles are found beside it.

    Raises:
        UsageError: unknown keys, two machines of one name, a link to a machine that is not there.
    """
    data.refuse_unknown(dict(table), ("machine", "link"), where)
    machines = [_machine(dict(entry), where) for entry in data.tables(table, "machine", where)]
    cluster = make_cluster(machines)
    names = {machine.name for machine in cluster.machines}
    links: dict[frozenset[str], NetworkLink] = {}
    for entry in data.tables(table, "link", where):
        data.refuse_unknown(dict(entry), ("between", "kind", "latency_s", "bandwidth_bytes_per_s", "handover_s"), where)
        pair = frozenset(data.texts(entry, "between", where))
        if len(pair) != 2 or not pair <= names:
            raise UsageError(
                "a link joins two machines",
                expected=f"between = two of {sorted(names)}",
                found=sorted(pair),
                where=where,
            )
        links[pair] = _link(dict(entry), where)
    return replace(cluster, links=links)


def _machine(entry: dict[str, Any], where: Path) -> Machine:
    data.refuse_unknown(entry, ("name", "chip", "profile", "memory", "gpu_cores", "limit", *_OVERRIDES), where)
    if ("chip" in entry) == ("profile" in entry):
        raise UsageError("a machine has either a chip or a profile", found=entry.get("name", "a machine"), where=where)
    if "profile" in entry:
        path = where.parent / str(entry["profile"])
        machine = machine_of_profile(data.read_profile(path), where=path)
    else:
        machine = machine_of_chip(
            str(entry["chip"]), round(_bytes(entry.get("memory", 0)) / GIB), gpu_cores=_cores(entry, where)
        )
    changes: dict[str, Any] = {}
    if "name" in entry:
        changes["name"] = str(entry["name"])
    if "limit" in entry:
        changes["limit"] = _limit(entry["limit"], machine, where)
    for key, field in _OVERRIDES.items():
        if key in entry:
            changes[field] = Value(number=positive(entry[key], key, where), source=where.name, status="set")
    return replace(machine, **changes)


def _link(entry: dict[str, Any], where: Path) -> NetworkLink:
    measured = ("latency_s", "bandwidth_bytes_per_s")
    if "kind" not in entry and not any(key in entry for key in measured):
        raise UsageError("a link has a kind, or latency_s and bandwidth_bytes_per_s", where=where)
    # What is not about the cable, such as the handover, is as with any other.
    base = link_of_kind("ethernet10" if any(key in entry for key in measured) else str(entry.get("kind")))
    if "handover_s" in entry:
        base = replace(base, handover_s=positive(entry["handover_s"], "handover_s", where))
    if "kind" in entry and not any(key in entry for key in measured):
        return base
    if "kind" in entry or not all(key in entry for key in measured):
        raise UsageError("a link has a kind, or latency_s and bandwidth_bytes_per_s", where=where)
    latency_s, bandwidth = (positive(entry[key], key, where) for key in measured)
    return replace(
        base,
        kind="measured",
        latency_s=latency_s,
        bandwidth_bytes_per_s=bandwidth,
        source=where.name,
    )


def _limit(value: int | str, machine: Machine, where: Path) -> Value:
    """A wired limit: bytes with a unit, or a number alone, which is GiB, or MiB where only `iogpu.wired_limit_mb` has such."""
    text = str(value).strip()
    if text == "0":
        return machine.limit
    limit_bytes, source = _bytes(value), where.name
    if text.isdecimal() and limit_bytes > machine.memory_bytes and GIB <= int(text) * MIB <= machine.memory_bytes:
        limit_bytes, source = int(text) * MIB, f"{where.name}, as iogpu.wired_limit_mb"
    check_limit(limit_bytes, machine.memory_bytes, found=f"limit = {value}", where=where)
    return Value(number=limit_bytes, source=source, status="set")


def _cores(entry: Mapping[str, Any], where: Path) -> int | None:
    cores = entry.get("gpu_cores")
    if cores is not None and (not isinstance(cores, int) or isinstance(cores, bool)):
        raise UsageError("gpu_cores is a number", expected="60 or 80", found=repr(cores)[:MOST_QUOTED], where=where)
    return cores


def _bytes(value: int | str) -> int:
    """Bytes of `512GiB`; memory is sold in GB and built in GiB, so `512GB` and a plain 512 mean GiB too, and MB are MiB."""
    text = str(value).strip()
    if text.isascii() and text.isdecimal():
        return int(text[:18]) * GIB
    return parse_bytes(re.sub(r"(?i)([gm])b$", r"\1iB", text))
