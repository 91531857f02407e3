"""Measuring this machine: profiles that the planner reads, links measured over loopback, promises that follow."""

from __future__ import annotations

import socket
import threading
import tomllib
from pathlib import Path

import pytest

from exo_kimi.bench.claims.link_speed import answer, measure_link
from exo_kimi.bench.claims.machine import measure
from exo_kimi.bench.claims.plan import CONFIG, promise
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import AddressError
from exo_kimi.planner.machines.hardware import machine_of_profile
from exo_kimi.planner.machines.profile_text import profile_answer, profile_toml


def test_a_measured_profile_is_read_by_the_planner_and_promises_something(tmp_path: Path) -> None:
    table = measure()
    again = tomllib.loads(profile_toml(table))
    machine = machine_of_profile(again, where="test")
    assert machine == machine_of_profile(table, where="test")
    for value in (machine.bandwidth, machine.prefill, machine.overhead, machine.attention_speed):
        assert value.status == "measured"
        assert value.number >= 0
        assert "lower quartile of" in value.source
    assert "measured" in profile_answer(table)
    directory = make_tiny(tmp_path / "tiny", recipe="uniform4", config=CONFIG)
    one, three = promise(directory, machine, [9]), promise(directory, machine, [3, 3, 3])
    assert one.tpot_s < three.tpot_s < one.tpot_s + 1e-3


def test_a_link_is_measured_over_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=answer, args=(listener,), daemon=True)
        peer.start()
        found = measure_link("127.0.0.1", listener.getsockname()[1])
        peer.join(10)
    assert 0 < found["latency_s"] < 0.05
    assert found["bandwidth_bytes_per_s"] > 1e7


def test_a_machine_that_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(AddressError, match="does not answer"):
        measure_link("127.0.0.1", port)
