"""Machines: what a chip's profile declares, what was measured, and what is only assumed.

Every value carries where it comes from. What nobody has published is listed in `unknown`, with what is assumed in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from exo_kimi.errors import UsageError
from exo_kimi.planner import data
from exo_kimi.units import GIB, format_bytes

Status = Literal["declared", "measured", "set", "assumed"]
VALUES = (
    "bandwidth_bytes_per_s",
    "prefill_flops_per_s",
    "attention_flops_per_s",
    "overhead_per_layer_s",
    "limit_bytes",
    "ssd_bytes_per_s",
)
OPTIONAL = (
    "attention_flops_per_s",
    "limit_bytes",
    "ssd_bytes_per_s",
)  # these follow from the others where nothing says them
PANIC_SHARE = 0.90  # kernel panics have been reported above this share of memory. Source: reference/planning.md
_NAME = re.compile(r"(m\d+(?:-(?:max|ultra|pro))?)-(\d{1,6})(?:-(\d{1,3})c)?")
# These were sold with 24 GB at most, and one layer of K2 with its reserve needs more than their limit.
TOO_SMALL_CHIPS = ("m1", "m2", "m3")
ZERO_ALLOWED = ("overhead_per_layer_s", "latency_s", "handover_s", "limit_bytes")
MOST_QUOTED = 60  # characters of a value that an error repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number of a machine, where it comes from and how far it can be trusted."""

    number: float
    source: str
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine of a cluster.

    Args:
        name: unique in its cluster.
        chip: as Apple names it.
        memory_bytes: all of it.
        limit: bytes that the GPU may keep resident (Metal's recommended working set, or iogpu.wired_limit_mb).
        bandwidth: bytes per second of memory.
        prefill: floating-point operations per second that prefill's products with weights really reach.
        attention: floating-point operations per second of attention over a context; None where it was not measured apart.
        ssd: bytes per second that its disk reads experts at; None where nobody has said it, and then nothing is streamed there.
        overhead: seconds per layer and step beside reading weights (kernel launches, synchronisation).
        thunderbolt: version, 0 for none.
        rdma: whether it has RDMA over Thunderbolt.
        limit_before_bytes: the limit that a sysctl would replace, where a plan counts on a raised one.
        choices: what its name leaves open, and what was taken.
    """

    name: str
    chip: str
    memory_bytes: int
    limit: Value
    bandwidth: Value
    prefill: Value
    overhead: Value
    attention: Value | None = None
    ssd: Value | None = None
    thunderbolt: int = 0
    rdma: bool = False
    limit_before_bytes: int | None = None
    choices: tuple[str, ...] = ()

    @property
    def attention_speed(self) -> Value:
        """Floating-point operations per second of attention: prefill's where it was not measured apart."""
        return self.attention or self.prefill

    @property
    def limit_bytes(self) -> int:
        """The limit, as a whole number."""
        return int(self.limit.number)

    @property
    def limit_now_bytes(self) -> int:
        """The limit that is set today, before any sysctl that a plan counts on."""
        return self.limit_bytes if self.limit_before_bytes is None else self.limit_before_bytes

    @property
    def ceiling_bytes(self) -> int:
        """The highest limit that a plan will ask for: an eighth of memory, from 8 to 24 GiB, stays with macOS."""
        return self.memory_bytes - min(max(self.memory_bytes // 8, 8 * GIB), 24 * GIB)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for machines that a plan may swap."""
        values = (self.limit, self.bandwidth, self.prefill, self.attention_speed, self.overhead)
        numbers = tuple(value.number for value in values)
        ssd = (0.0, "") if self.ssd is None else (self.ssd.number, self.ssd.status)
        return (self.memory_bytes, *numbers, ssd, self.thunderbolt, self.rdma)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is assumed because it is not known."""
        values = {
            "memory bandwidth": self.bandwidth,
            "prefill speed": self.prefill,
            "overhead per layer": self.overhead,
        }
        assumed = (f"{what}: {value.source}" for what, value in values.items() if value.status == "assumed")
        return (*assumed, *self.choices)

    def with_raised_limit(self) -> Machine:
        """The same machine with its wired limit at the ceiling, if that is more than it has."""
        if self.ceiling_bytes <= self.limit_bytes:
            return self
        limit = Value(number=self.ceiling_bytes, source="raised by sysctl", status="set")
        return replace(self, limit=limit, limit_before_bytes=self.limit_bytes)


def default_limit_bytes(memory_bytes: int) -> int:
    """Metal's default working set: three quarters of memory, two thirds up to 32 GiB.

    Source: `recommendedMaxWorkingSetSize` as reported by llama.cpp and mlx on M1 to M3 (21,845 of 32,768 MB; 73,728 of
    98,304 MB; 147,456 of 196,608 MB). macOS 26 reports more on some machines: measure.
    """
    return memory_bytes * 2 // 3 if memory_bytes <= 32 * GIB else memory_bytes * 3 // 4


def chip_names() -> tuple[str, ...]:
    """Chips with a profile."""
    return tuple(name for name in data.names("profiles") if name != "links")


def chip_memories(chip: str) -> tuple[int, ...]:
    """Memory sizes in GiB that the chip is sold with."""
    return tuple(sorted({size for part in data.load("profiles", chip)["configuration"] for size in part["memory_gib"]}))


def chip_cores(chip: str, memory_gib: int) -> tuple[int, ...]:
    """Numbers of GPU cores that the chip is sold with beside that memory, the fewest first."""
    parts = data.load("profiles", chip)["configuration"]
    return tuple(sorted(part["gpu_cores"] for part in parts if memory_gib in part["memory_gib"]))


def machine_of_chip(chip: str, memory_gib: int, *, gpu_cores: int | None = None, name: str | None = None) -> Machine:
    """A machine as its chip's profile declares it.

    Args:
        chip: as Apple or a profile names it.
        memory_gib: of the machine.
        gpu_cores: where the chip is sold with several numbers of them; the most that come with that memory when not given, and
            the machine says so.
        name: of the machine; chip and memory when not given.

    Raises:
        UsageError: no profile of that chip, or the chip is not sold with that memory or those cores.
    """
    key = chip.strip().lower().removeprefix("apple ").replace(" ", "-")
    if key not in chip_names():
        raise _no_profile(chip, key)
    table = data.load("profiles", key)
    parts = _configurations(table, memory_gib)
    part = parts[-1] if gpu_cores is None else next((p for p in parts if p["gpu_cores"] == gpu_cores), None)
    if part is None:
        cores = " or ".join(str(part["gpu_cores"]) for part in parts)
        raise UsageError(
            f"{table['chip']} with {memory_gib} GB is not sold with that many GPU cores",
            expected=cores,
            found=gpu_cores,
        )
    own = f"{key}-{memory_gib}" + (f"-{gpu_cores}c" if gpu_cores is not None and part is not parts[-1] else "")
    sources = {"assumed": {**table.get("assumed", {}), **part.get("assumed", {})}}
    sources["unknown"] = {**table.get("unknown", {}), **part.get("unknown", {})}
    declared = {**table.get("decode", {}), **table.get("disk", {}), **{key: part[key] for key in VALUES if key in part}}
    open_choices = [] if gpu_cores is not None else [str(other["gpu_cores"]) for other in parts[:-1]]
    memory_bytes = memory_gib * GIB
    return Machine(
        name=name or own,
        chip=table["chip"],
        memory_bytes=memory_bytes,
        limit=default_limit(memory_bytes),
        bandwidth=_value("bandwidth_bytes_per_s", declared, table, sources),
        prefill=_value("prefill_flops_per_s", declared, table, sources),
        overhead=_value("overhead_per_layer_s", declared, table, sources),
        ssd=_value("ssd_bytes_per_s", declared, table, sources) if "ssd_bytes_per_s" in declared else None,
        thunderbolt=table["thunderbolt"],
        rdma=table["rdma"],
        choices=tuple(
            f"GPU cores: {part['gpu_cores']} of them; a machine with {fewer} is {key}-{memory_gib}-{fewer}c"
            for fewer in open_choices
        ),
    )


def default_limit(memory_bytes: int) -> Value:
    """The limit that macOS sets itself, as `iogpu.wired_limit_mb=0` leaves it."""
    number = default_limit_bytes(memory_bytes)
    return Value(number=number, source="Metal's default, about 75 % of memory", status="declared")


def check_limit(limit_bytes: float, memory_bytes: int, *, found: object, where: object) -> None:
    """Refuse a limit above the machine's memory.

    Raises:
        UsageError: with both.
    """
    if limit_bytes > memory_bytes:
        raise UsageError(
            "a limit above the machine's memory",
            expected=f"at most {format_bytes(memory_bytes)}, or 0 for Apple's default",
            found=str(found)[:MOST_QUOTED],
            where=where,
            fix="write the unit, as `480GiB`; a number alone is GiB, or MiB where it is one of `iogpu.wired_limit_mb`",
        )


def _no_profile(chip: str, key: str) -> UsageError:
    if key in TOO_SMALL_CHIPS:
        return UsageError(
            f"{chip} was sold with 24 GB at most, which holds no layer of Kimi K2 with its reserve",
            expected=f"one of {', '.join(chip_names())}",
            found=repr(chip)[:MOST_QUOTED],
        )
    return UsageError(
        "unknown chip",
        expected=f"one of {', '.join(chip_names())}",
        found=repr(chip)[:MOST_QUOTED],
        fix="a chip without a profile can be measured: `exo-kimi machine --measure -o machine.toml` on it",
    )


def _configurations(table: Mapping[str, Any], memory_gib: int) -> list[Mapping[str, Any]]:
    """The chip's configurations with that memory, the fewest GPU cores first."""
    parts = sorted(
        (part for part in table["configuration"] if memory_gib in part["memory_gib"]),
        key=lambda part: part["gpu_cores"],
    )
    if parts:
        return parts
    sizes = ", ".join(map(str, chip_memories(table["name"])))
    if memory_gib in table.get("too_small_gib", ()):
        raise UsageError(
            f"{table['chip']} with {memory_gib} GB holds no layer of Kimi K2 with its reserve",
            expected=f"{sizes} GB",
            found=f"{memory_gib} GB",
        )
    raise UsageError(f"{table['chip']} is not sold with that memory", expected=f"{sizes} GB", found=f"{memory_gib} GB")


def machines_by_memory() -> list[Machine]:
    """Every machine that is sold, the smallest memory first, then the fastest."""
    machines = [machine_of_chip(chip, size) for chip in chip_names() for size in chip_memories(chip)]
    return sorted(machines, key=lambda machine: (machine.memory_bytes, -machine.bandwidth.number, machine.name))


def machine_of_name(text: str) -> Machine:
    """A machine from a name such as `m3-ultra-512` or `m3-ultra-256-60c`.

    Raises:
        UsageError: not of that form, or no such machine.
    """
    match = _NAME.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(
            "cannot read a machine",
            expected="chip and gigabytes, such as m3-ultra-512, or with GPU cores, such as m3-ultra-256-60c",
            found=repr(text.strip())[:MOST_QUOTED],
            where="--cluster",
        )
    return machine_of_chip(match[1], int(match[2]), gpu_cores=None if match[3] is None else int(match[3]))


def machine_of_profile(table: Mapping[str, Any], *, where: object) -> Machine:
    """A measured profile, as `exo-kimi machine --measure -o FILE` writes it; it overrides what the chip declares.

    Raises:
        UsageError: unknown keys, or a value that is neither measured nor declared.
    """
    known = ("name", "chip", "base", "memory_gib", "gpu_cores", "thunderbolt", "rdma", "measured", "source")
    data.refuse_unknown(dict(table), known, where)
    measured, source = table.get("measured", {}), table.get("source", {})
    if not isinstance(measured, Mapping) or not isinstance(source, Mapping):
        raise UsageError("measured and source are tables", expected="[measured] and [source]", where=where)
    data.refuse_unknown(dict(measured), VALUES, where)
    if not isinstance(table.get("thunderbolt", 0), int):
        raise UsageError(
            "thunderbolt is a version", expected="4 or 5, 0 for none", found=table["thunderbolt"], where=where
        )
    if "memory_gib" not in table:
        raise UsageError("a profile needs memory_gib", where=where)
    base = None
    memory_bytes = round(positive(table["memory_gib"], "memory_gib", where) * GIB)
    if "base" in table:
        base = machine_of_chip(str(table["base"]), round(table["memory_gib"]), gpu_cores=table.get("gpu_cores"))
    missing = [key for key in VALUES if key not in measured and base is None and key not in OPTIONAL]
    if missing:
        raise UsageError(
            "a profile without a base must measure everything",
            expected=", ".join(key for key in VALUES if key not in OPTIONAL),
            found=f"no {missing[0]}",
            where=where,
        )

    if "limit_bytes" in measured:
        check_limit(
            positive(measured["limit_bytes"], "limit_bytes", where),
            memory_bytes,
            found=measured["limit_bytes"],
            where=where,
        )

    def pick(key: str, declared: Value | None) -> Value:
        if key in measured and (key, measured[key]) != ("limit_bytes", 0):  # 0 is Apple's default
            number = positive(measured[key], key, where)
            return Value(number=number, source=str(source.get(key, "measured")), status="measured")
        if declared is None:
            return Value(
                number=default_limit_bytes(memory_bytes), source="Metal's default share of memory", status="assumed"
            )
        return declared

    return Machine(
        name=str(table.get("name", base.name if base else "machine")),
        chip=str(table.get("chip", base.chip if base else "unknown chip")),
        memory_bytes=memory_bytes,
        limit=pick("limit_bytes", base.limit if base else None),
        bandwidth=pick("bandwidth_bytes_per_s", base.bandwidth if base else None),
        prefill=pick("prefill_flops_per_s", base.prefill if base else None),
        overhead=pick("overhead_per_layer_s", base.overhead if base else None),
        attention=pick("attention_flops_per_s", None) if "attention_flops_per_s" in measured else None,
        ssd=pick("ssd_bytes_per_s", None) if "ssd_bytes_per_s" in measured else (base.ssd if base else None),
        thunderbolt=table.get("thunderbolt", base.thunderbolt if base else 0),
        rdma=table.get("rdma", base.rdma if base else False) is True,
        choices=base.choices if base and "prefill_flops_per_s" not in measured else (),
    )


def positive(value: object, key: str, where: object) -> float:
    """A number above zero; those of ZERO_ALLOWED may be zero.

    Raises:
        UsageError: anything else.
    """
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if number is None or not (0 < number < math.inf or (number == 0 and key in ZERO_ALLOWED)):
        raise UsageError(f"{key} is not a number above zero", found=repr(value)[:MOST_QUOTED], where=where)
    return float(number)


def _value(
    key: str, declared: Mapping[str, float], table: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
) -> Value:
    if key in declared:
        return Value(number=declared[key], source=table["source"][key], status="declared")
    return Value(number=sources["assumed"][key], source=sources["unknown"][key], status="assumed")
