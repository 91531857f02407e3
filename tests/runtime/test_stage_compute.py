"""What a stage process says of its work."""

from __future__ import annotations

from exo_kimi.runtime.stage_compute import read_at


def test_a_loaded_stage_tells_its_bytes_seconds_and_gigabytes_per_second() -> None:
    assert read_at(1_200_000_000, 0.4) == "1.2 GB in 400 ms, 3.0 GB/s"
    assert read_at(0, 0.4) == "which it held already"
