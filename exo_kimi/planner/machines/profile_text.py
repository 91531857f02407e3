"""A machine's profile as text for people and as TOML for files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w

from exo_kimi.errors import UsageError
from exo_kimi.planner.machines.hardware import Machine, machine_of_profile
from exo_kimi.units import format_bytes


def machine_text(machine: Machine) -> str:
    """Every value with its status and source."""
    rows = [
        ("memory", format_bytes(machine.memory_bytes), "", ""),
        ("limit", format_bytes(machine.limit_bytes), machine.limit.status, machine.limit.source),
        ("ceiling", format_bytes(machine.ceiling_bytes), "", "the highest wired limit that a plan asks for"),
        (
            "bandwidth",
            f"{machine.bandwidth.number / 1e9:.3g} GB/s",
            machine.bandwidth.status,
            machine.bandwidth.source,
        ),
        ("prefill", f"{machine.prefill.number / 1e12:.3g} TFLOP/s", machine.prefill.status, machine.prefill.source),
        (
            "attention",
            f"{machine.attention_speed.number / 1e12:.3g} TFLOP/s",
            machine.attention_speed.status,
            machine.attention_speed.source
            if machine.attention
            else "as prefill: mlx-lm's slope, ours was not measured",
        ),
        (
            "overhead",
            f"{machine.overhead.number * 1e6:.0f} us a layer",
            machine.overhead.status,
            machine.overhead.source,
        ),
    ]
    if machine.ssd is not None:
        rows.append(("disk", f"{machine.ssd.number / 1e9:.3g} GB/s", machine.ssd.status, machine.ssd.source))
    else:
        rows.append(("disk", "not known", "", "nothing is streamed: `exo-kimi machine --measure`, or `plan --ssd`"))
    thunderbolt = f"Thunderbolt {machine.thunderbolt}" if machine.thunderbolt else "no Thunderbolt known"
    links = thunderbolt + (", RDMA (macOS 26.2 or later)" if machine.rdma else ", no RDMA")
    lines = [f"{machine.name}: {machine.chip}, {links}"]
    lines += [f"  {name:<10} {value:<16} {status:<9} {source}".rstrip() for name, value, status, source in rows]
    return "\n".join(lines) + "\n"


def profile_answer(table: Mapping[str, Any]) -> str:
    """A profile table as text; a machine that is neither known nor measured is said to be so."""
    try:
        return machine_text(machine_of_profile(table, where="this machine"))
    except UsageError:
        return (
            f"{table['chip']}, {table['memory_gib']} GiB: no profile of this chip.\n"
            "`exo-kimi machine --measure -o FILE` measures it; put `profile = FILE` into cluster.toml.\n"
        )


def profile_toml(table: Mapping[str, Any]) -> str:
    """A profile table as a file for cluster.toml; reading it gives the table back."""
    return tomli_w.dumps({key: value for key, value in table.items() if value != {}})
