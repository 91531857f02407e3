"""The profile of this machine: chip, memory and wired limit as the system tells them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from typing import Any

from exo_kimi.planner.machines.hardware import chip_cores, chip_memories, chip_names
from exo_kimi.units import GIB


def local_profile() -> dict[str, Any]:
    """A profile table of this machine, with a `base` where its chip has a profile.

    A wired limit that somebody has set counts as measured. Source: `sysctl machdep.cpu.brand_string`, `hw.memsize` and
    `iogpu.wired_limit_mb` on macOS; `sysconf` elsewhere.
    """
    if platform.system() == "Darwin":
        wired_mb = int(_sysctl("iogpu.wired_limit_mb") or 0)
        return profile_table(
            _sysctl("machdep.cpu.brand_string"),
            int(_sysctl("hw.memsize") or 0),
            wired_mb=wired_mb,
            gpu_cores=gpu_cores_of(_answer("ioreg", "-r", "-d", "1", "-c", "AGXAccelerator")),
        )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return profile_table(f"{platform.machine()}, {os.cpu_count()} cores", memory_bytes, wired_mb=0)


def gpu_cores_of(registry: str) -> int | None:
    """The number of GPU cores in what `ioreg -c AGXAccelerator` prints; None where it does not say it."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', registry)
    return int(found[1]) if found else None


def profile_table(chip: str, memory_bytes: int, *, wired_mb: int, gpu_cores: int | None = None) -> dict[str, Any]:
    """The table of a machine.

    Args:
        chip: as the system names it, such as `Apple M3 Ultra`.
        memory_bytes: all of it.
        wired_mb: `iogpu.wired_limit_mb`, in MiB as Apple counts it; 0 where macOS decides.
        gpu_cores: where the system says them.
    """
    table: dict[str, Any] = {"chip": chip, "memory_gib": round(memory_bytes / GIB, 3)}
    key = chip.lower().removeprefix("apple ").replace(" ", "-")
    if key in chip_names() and round(memory_bytes / GIB) in chip_memories(key):
        table |= {"base": key, "memory_gib": round(memory_bytes / GIB)}
        if gpu_cores in chip_cores(key, round(memory_bytes / GIB)):
            table["gpu_cores"] = gpu_cores
    measured, source = {}, {}
    if wired_mb:
        measured["limit_bytes"] = wired_mb << 20
        source["limit_bytes"] = "sysctl iogpu.wired_limit_mb"
    return {**table, "measured": measured, "source": source}


def _sysctl(name: str) -> str:
    return _answer("sysctl", "-n", name)


def _answer(program: str, *arguments: str) -> str:
    path = shutil.which(program) or f"/usr/sbin/{program}"
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a system without it tells nothing
        return ""
