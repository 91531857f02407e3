"""Bytes and seconds, parsed and printed in one way: GB is 10^9 bytes, GiB is 2^30."""

from __future__ import annotations

import re

from exo_kimi.errors import UsageError

GIB = 1 << 30

BYTES_PER_UNIT = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
SECONDS_PER_UNIT = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of a text such as `512GB`, `8.5 GiB` or `4096`.

    Raises:
        UsageError: it is not a number with a known unit.
    """
    units = {name.lower(): size for name, size in BYTES_PER_UNIT.items()}
    return round(_parse(text, units, plain="b", example="512GB, 8GiB or 4096"))


def parse_seconds(text: str) -> float:
    """Seconds of a text such as `30`, `30s`, `250ms` or `5min`.

    Raises:
        UsageError: it is not a number with a known unit.
    """
    return _parse(text, SECONDS_PER_UNIT, plain="s", example="30s, 250ms or 5min")


def format_bytes(count: int) -> str:
    """`8.94 GiB`: binary units, three significant digits or more; exact below 1 KiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def format_gb(count: int) -> str:
    """`495.9 GB`: decimal units, as checkpoints are named."""
    return f"{count / 1e9:.1f} GB"


def format_seconds(seconds: float) -> str:
    """`12 ms`, `3.4 s` or `5 min 20 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _parse(text: str, units: dict[str, float] | dict[str, int], *, plain: str, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = (match[2].lower() or plain) if match else ""
    if match is None or unit not in units:
        raise UsageError("cannot read a quantity", expected=example, found=repr(text))
    return float(match[1]) * units[unit]
