"""Profiles as text and as files, and what a machine says of itself."""

from __future__ import annotations

import tomllib

import pytest

from exo_kimi.planner.machines.hardware import chip_memories, chip_names, machine_of_chip, machine_of_profile
from exo_kimi.planner.machines.local import local_profile, profile_table
from exo_kimi.planner.machines.profile_text import machine_text, profile_answer, profile_toml

GIB = 1 << 30


@pytest.mark.parametrize("chip", chip_names())
def test_a_mac_knows_its_profile_from_what_the_system_says(chip: str) -> None:
    size = chip_memories(chip)[-1]
    declared = machine_of_chip(chip, size)
    table = profile_table(declared.chip, size * GIB, wired_mb=0)
    assert machine_of_profile(table, where="test") == declared
    text = profile_answer(table)
    for value in (declared.limit, declared.bandwidth, declared.prefill, declared.overhead):
        assert value.source in text
        assert value.status in text


def test_a_wired_limit_that_is_set_is_taken() -> None:
    machine = machine_of_profile(profile_table("Apple M3 Ultra", 512 * GIB, wired_mb=450_560), where="test")
    assert machine.limit_bytes == 440 * GIB
    assert "iogpu.wired_limit_mb" in machine_text(machine)


def test_a_machine_without_a_profile_is_asked_to_measure() -> None:
    assert "--measure" in profile_answer(profile_table("Apple M9 Giga", 64 * GIB, wired_mb=0))
    assert local_profile()["memory_gib"] > 0


def test_a_profile_file_gives_the_table_back() -> None:
    table = profile_table("Apple M2 Ultra", 192 * GIB, wired_mb=160_000)
    table["measured"]["bandwidth_bytes_per_s"] = 7.0123456789e11
    table["source"]["bandwidth_bytes_per_s"] = 'a "quoted" source'
    assert tomllib.loads(profile_toml(table)) == table
