"""A cluster: its machines and the links between them, from an inline list or cluster.toml.

[[machine]]
name = "studio"            # default: chip and memory
chip = "m3-ultra"          # or profile = "studio.toml", as `exo-kimi machine --measure -o` writes it
memory = "512GiB"
limit = "480GiB"           # the wired limit that is set; default: Metal's
# bandwidth_bytes_per_s, prefill_flops_per_s, overhead_per_layer_s: override the profile

[[link]]
between = ["studio", "mini"]
kind = "thunderbolt4"      # or latency_s and bandwidth_bytes_per_s, measured
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
    Machine,
    Value,
    machine_of_chip,
    machine_of_name,
    machine_of_profile,
    positive,
)
from exo_kimi.units import GIB, parse_bytes

MOST_MACHINES = 8
_COUNTED = re.compile(r"(\d)\s*[x*]\s*(.+)")
_OVERRIDES = {
    "bandwidth_bytes_per_s": "bandwidth",
    "prefill_flops_per_s": "prefill",
    "overhead_per_layer_s": "overhead",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLink:
    """A way between two machines: seconds one way for a small message, and bytes per second."""

    kind: str
    latency_s: float
    bandwidth_bytes_per_s: float
    source: str

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
        return link_of_kind(f"thunderbolt{version}" if version >= 4 else "ethernet10")

    def with_raised_limits(self) -> Cluster:
        """The same cluster with every wired limit at its ceiling."""
        return replace(self, machines=tuple(machine.with_raised_limit() for machine in self.machines))

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
        raise UsageError("unknown link", expected=f"one of {', '.join(table)}", found=repr(kind))
    return NetworkLink(kind=kind, **table[kind])


def make_cluster(machines: list[Machine], links: Mapping[frozenset[str], NetworkLink] | None = None) -> Cluster:
    """Machines in one order whatever the order given; equal names get -2, -3, ...

    Raises:
        UsageError: no machine, or more than the exact solver takes.
    """
    if not 1 <= len(machines) <= MOST_MACHINES:
        raise UsageError("a cluster has 1 to 8 machines", expected=f"1 to {MOST_MACHINES}", found=len(machines))
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
        machines += [machine_of_name(counted[2] if counted else part)] * (int(counted[1]) if counted else 1)
    return make_cluster(machines)


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
        data.refuse_unknown(dict(entry), ("between", "kind", "latency_s", "bandwidth_bytes_per_s"), where)
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
    data.refuse_unknown(entry, ("name", "chip", "profile", "memory", "limit", *_OVERRIDES), where)
    if ("chip" in entry) == ("profile" in entry):
        raise UsageError("a machine has either a chip or a profile", found=entry.get("name", "a machine"), where=where)
    if "profile" in entry:
        path = where.parent / str(entry["profile"])
        machine = machine_of_profile(data.read(path, "profile"), where=path)
    else:
        machine = machine_of_chip(str(entry["chip"]), round(_bytes(entry.get("memory", 0)) / GIB))
    changes: dict[str, Any] = {}
    if "name" in entry:
        changes["name"] = str(entry["name"])
    if "limit" in entry:
        changes["limit"] = Value(number=_bytes(entry["limit"]), source=f"{where.name}", status="set")
    for key, field in _OVERRIDES.items():
        if key in entry:
            changes[field] = Value(number=positive(entry[key], key, where), source=where.name, status="set")
    return replace(machine, **changes)


def _link(entry: dict[str, Any], where: Path) -> NetworkLink:
    measured = ("latency_s", "bandwidth_bytes_per_s")
    if "kind" in entry and not any(key in entry for key in measured):
        return link_of_kind(str(entry["kind"]))
    if "kind" in entry or not all(key in entry for key in measured):
        raise UsageError("a link has a kind, or latency_s and bandwidth_bytes_per_s", where=where)
    latency_s, bandwidth = (positive(entry[key], key, where) for key in measured)
    return NetworkLink(kind="measured", latency_s=latency_s, bandwidth_bytes_per_s=bandwidth, source=where.name)


def _bytes(value: int | str) -> int:
    """Bytes of `512GiB`; memory is sold in GB and built in GiB, so `512GB` and a plain 512 mean GiB too."""
    text = str(value).strip()
    if text.isdecimal():
        return int(text) * GIB
    return parse_bytes(re.sub(r"(?i)gb$", "GiB", text))
