"""Machines and clusters: every value has a source, what is unknown says so, what is measured wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.errors import UsageError
from exo_kimi.planner import data
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.machines.cluster import Cluster, link_of_kind, make_cluster, read_cluster
from exo_kimi.planner.machines.hardware import (
    chip_memories,
    chip_names,
    machine_of_chip,
    machine_of_name,
    machine_of_profile,
    machines_by_memory,
)
from exo_kimi.planner.machines.local import gpu_cores_of, profile_table

GIB = 1 << 30


@pytest.mark.parametrize("chip", chip_names())
def test_every_value_of_every_chip_has_a_source_or_is_called_unknown(chip: str) -> None:
    table = data.load("profiles", chip)
    for size in chip_memories(chip):
        machine = machine_of_chip(chip, size)
        assert machine.memory_bytes == size * GIB
        for value in (machine.bandwidth, machine.prefill, machine.overhead, machine.limit):
            assert value.number > 0
            assert len(value.source) > 10
            assert value.status in ("declared", "assumed")
        assert set(table.get("assumed", {})) == set(table.get("unknown", {}))
        assert machine.rdma == (machine.thunderbolt >= 5)
        assert machine.limit_bytes <= machine.ceiling_bytes < machine.memory_bytes


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth", "limit_gib"),
    [
        ("m3-ultra-512", 512, 819e9, 384),
        ("m2-ultra-192", 192, 800e9, 144),
        ("m4-max-128", 128, 546e9, 96),
        ("m4-max-36", 36, 410e9, 27),
        ("m3-max-96", 96, 300e9, 72),
        ("m5-max-128", 128, 614e9, 96),
        ("m5-ultra-256", 256, 1.2e12, 192),
        ("M1-Max-32", 32, 400e9, 32 * 2 / 3),
    ],
)
def test_names_are_read(name: str, memory: int, bandwidth: float, limit_gib: float) -> None:
    machine = machine_of_name(name)
    assert machine.memory_bytes == memory * GIB
    assert machine.bandwidth.number == bandwidth
    assert machine.limit_bytes == int(limit_gib * GIB)


@pytest.mark.parametrize("name", ["m3-ultra", "m3-ultra-500", "m9-ultra-512", "m4-ultra-512", "512", ""])
def test_a_machine_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        machine_of_name(name)


def test_what_nobody_has_published_is_said() -> None:
    assert any("prefill" in text for text in machine_of_name("m5-ultra-512").unknown)
    assert machine_of_name("m3-ultra-512").unknown == ()


def test_a_measured_profile_overrides_the_declared_one_and_says_so() -> None:
    table = {
        "name": "studio",
        "base": "m2-ultra",
        "memory_gib": 192,
        "measured": {"bandwidth_bytes_per_s": 701e9, "limit_bytes": 150 * GIB},
        "source": {"bandwidth_bytes_per_s": "exo-kimi machine --measure, 2026-11-21"},
    }
    machine = machine_of_profile(table, where="test")
    assert (machine.bandwidth.number, machine.bandwidth.status) == (701e9, "measured")
    assert "2026-11-21" in machine.bandwidth.source
    assert (machine.limit_bytes, machine.limit.status) == (150 * GIB, "measured")
    assert machine.prefill.status == "declared"
    assert machine.chip == "Apple M2 Ultra"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"measured": {"speed": 1}}, "unknown key"),
        ({"base": "m7-ultra"}, "unknown chip"),
        ({"memory_gib": 100}, "not sold"),
        ({"base": None}, "measure everything"),
        ({"memory_gib": None}, "memory_gib"),
        ({"memory_gib": "much"}, "above zero"),
        ({"measured": 3}, "tables"),
        ({"thunderbolt": "five"}, "version"),
        ({"measured": {"prefill_flops_per_s": -1}}, "above zero"),
    ],
)
def test_a_malformed_profile_is_refused(change: dict[str, Any], word: str) -> None:
    table: dict[str, Any] = {"base": "m2-ultra", "memory_gib": 192, "measured": {}, **change}
    table = {key: value for key, value in table.items() if value is not None}
    with pytest.raises(UsageError, match=word):
        machine_of_profile(table, where="test")


def test_a_machine_without_a_chip_profile_can_be_measured_whole() -> None:
    measured = {"bandwidth_bytes_per_s": 1e9, "prefill_flops_per_s": 1e10, "overhead_per_layer_s": 1e-3}
    machine = machine_of_profile({"chip": "2 x86 cores", "memory_gib": 7.5, "measured": measured}, where="test")
    assert machine.unknown == ()
    assert machine.memory_bytes == round(7.5 * GIB)
    assert machine.limit.status == "assumed"


@settings(deadline=None)
@given(st.permutations(["m3-ultra-512", "m2-ultra-192", "m3-ultra-512", "m1-max-64"]))
def test_a_cluster_is_the_same_whatever_the_order_of_its_list(names: list[str]) -> None:
    cluster = read_cluster(", ".join(names))
    assert [m.name for m in cluster.machines] == ["m1-max-64", "m2-ultra-192", "m3-ultra-512", "m3-ultra-512-2"]
    assert cluster == read_cluster("m1-max-64,m2-ultra-192,2x m3-ultra-512")


def test_one_machine_more_leaves_the_names_of_the_others() -> None:
    cluster = read_cluster("2x m3-ultra-512")
    more = cluster.with_machine(machine_of_name("m3-ultra-512"))
    assert [m.name for m in more.machines] == ["m3-ultra-512", "m3-ultra-512-2", "m3-ultra-512-3"]


def test_a_link_is_the_best_that_both_ends_have() -> None:
    cluster = read_cluster("m3-ultra-512, m2-ultra-192, m4-max-128")
    m2, m3, m4 = cluster.machines
    assert cluster.link(m3, m4) == link_of_kind("thunderbolt5")
    assert cluster.link(m2, m3) == cluster.link(m3, m2) == link_of_kind("thunderbolt4")
    with pytest.raises(UsageError, match="thunderbolt4"):
        link_of_kind("carrier pigeon")


def test_cluster_toml_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "mini.toml").write_text(
        'base = "m4-max"\nmemory_gib = 128\n[measured]\nbandwidth_bytes_per_s = 5e11\n[source]\nbandwidth_bytes_per_s = "here"\n'
    )
    path = tmp_path / "cluster.toml"
    path.write_text(
        """
        [[machine]]
        name = "studio"
        chip = "m3-ultra"
        memory = "512GB"
        limit = "480GiB"
        overhead_per_layer_s = 3e-4
        [[machine]]
        name = "mini"
        profile = "mini.toml"
        [[machine]]
        chip = "m2-ultra"
        memory = 192
        [[link]]
        between = ["mini", "studio"]
        latency_s = 40e-6
        bandwidth_bytes_per_s = 7e9
        [[link]]
        between = ["mini", "m2-ultra-192"]
        kind = "ethernet1"
        """
    )
    cluster = read_cluster(path)
    by_name = {machine.name: machine for machine in cluster.machines}
    assert sorted(by_name) == ["m2-ultra-192", "mini", "studio"]
    assert by_name["studio"].limit_bytes == 480 * GIB
    assert by_name["studio"].overhead.number == 3e-4
    assert by_name["mini"].bandwidth.status == "measured"
    assert cluster.link(by_name["mini"], by_name["studio"]).latency_s == 40e-6
    assert cluster.link(by_name["mini"], by_name["m2-ultra-192"]).kind == "ethernet1"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "1 to 8"),
        ("[[machines]]\n", "unknown key"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = 512\nram = 3\n', "unknown key"),
        ('[[machine]]\nname = "x"\n', "either"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = "512 apples"\n', "quantity"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = 512\n[[link]]\nbetween = ["a", "b"]\nkind = "rdma"\n', "joins two"),
        ("machine = [", "cluster"),
        ("machine = 3\n", "list of tables"),
        ("[[machine]]\nchip = 3\nmemory = 512\n", "unknown chip"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = 512\n[[link]]\nbetween = "ab"\n', "list of texts"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = 512\nbandwidth_bytes_per_s = 0\n', "above zero"),
        ('[[machine]]\nchip = "m3-ultra"\nmemory = 512\nbandwidth_bytes_per_s = "fast"\n', "above zero"),
    ],
)
def test_a_malformed_cluster_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=word):
        read_cluster(path)


def test_more_than_eight_machines_are_refused() -> None:
    with pytest.raises(UsageError, match="1 to 8"):
        make_cluster([machine_of_name("m1-max-64")] * 9)


def test_raised_limits_leave_macos_an_eighth_up_to_24_gib() -> None:
    raised = {machine.name: machine.with_raised_limit() for machine in machines_by_memory()}
    assert raised["m3-ultra-512"].limit_bytes == 488 * GIB
    assert raised["m2-ultra-192"].limit_bytes == 168 * GIB
    assert raised["m4-max-128"].limit_bytes == 112 * GIB
    assert raised["m1-max-64"].limit_bytes == 56 * GIB
    assert raised["m1-max-64"].limit_before_bytes == 48 * GIB


def cluster_of(tmp_path: Path, text: str) -> Cluster:
    """A cluster.toml with this text, read."""
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return read_cluster(path)


STUDIO = '[[machine]]\nchip = "m3-ultra"\nmemory = "512GiB"\nlimit = '


@pytest.mark.parametrize(
    ("limit", "bytes_"),
    [
        ("0", 384 * GIB),
        ('"0"', 384 * GIB),
        ("480", 480 * GIB),
        ('"480GiB"', 480 * GIB),
        ('"480GB"', 480 * GIB),
        ("507000", 507_000 << 20),
        ('"507000"', 507_000 << 20),
        ('"507000MB"', 507_000 << 20),
        ('"507000MiB"', 507_000 << 20),
        ("524288", 512 * GIB),
    ],
)
def test_a_limit_is_read_as_it_is_meant(tmp_path: Path, limit: str, bytes_: int) -> None:
    (machine,) = cluster_of(tmp_path, STUDIO + limit).machines
    assert machine.limit_bytes == bytes_
    assert ("iogpu.wired_limit_mb" in machine.limit.source) == (limit.strip('"') in ("507000", "524288"))


@pytest.mark.parametrize("limit", ["600", "524289", '"513GiB"', '"1TB"', '"600GB"', "9" * 400])
def test_a_limit_above_the_memory_is_refused_in_one_short_line(tmp_path: Path, limit: str) -> None:
    with pytest.raises(UsageError, match="above the machine's memory") as error:
        cluster_of(tmp_path, STUDIO + f'"{limit}"'.replace('""', '"'))
    assert "512.00 GiB" in str(error.value)
    assert max(len(line) for line in str(error.value).splitlines()) < 300


def test_a_measured_limit_is_held_to_the_memory_too() -> None:
    table: dict[str, Any] = {"base": "m3-ultra", "memory_gib": 512, "measured": {"limit_bytes": 507_000 << 40}}
    with pytest.raises(UsageError, match="above the machine's memory"):
        machine_of_profile(table, where="test")
    table["measured"] = {"limit_bytes": 0}
    assert machine_of_profile(table, where="test").limit_bytes == 384 * GIB


@pytest.mark.parametrize(
    ("name", "bandwidth", "thunderbolt"),
    [
        ("m4-32", 120e9, 4),
        ("m4-pro-64", 273e9, 5),
        ("m5-32", 153e9, 4),
        ("m5-pro-64", 307e9, 5),
        ("m1-pro-32", 200e9, 4),
        ("m2-pro-32", 200e9, 4),
        ("m3-pro-36", 150e9, 4),
        ("m3-ultra-256-60c", 819e9, 5),
        ("M1-Max-64-24C", 400e9, 4),
    ],
)
def test_every_mac_that_can_hold_a_stage_is_known(name: str, bandwidth: float, thunderbolt: int) -> None:
    machine = machine_of_name(name)
    assert (machine.bandwidth.number, machine.thunderbolt) == (bandwidth, thunderbolt)
    assert machine.name == name.lower()


def test_fewer_gpu_cores_compute_less_and_a_name_that_leaves_them_open_says_what_was_taken() -> None:
    most, fewer = machine_of_name("m3-ultra-256"), machine_of_name("m3-ultra-256-60c")
    assert fewer.prefill.number == pytest.approx(most.prefill.number * 60 / 80, rel=1e-3)
    assert "80 of them" in most.unknown[0]
    assert "m3-ultra-256-60c" in most.unknown[0]
    assert any("60 GPU cores" in text for text in fewer.unknown)
    assert machine_of_name("m3-ultra-256-80c").unknown == ()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("12x", "1 to 8"),
        ("12x m3-ultra-512", "1 to 8"),
        ("0x m3-ultra-512", "1 to 8"),
        ("99999999999999999999x m3-ultra-512", "1 to 8"),
        ("5x m3-ultra-512, 4x m3-ultra-512", "1 to 8"),
        ("2x", "without a machine"),
        ("m3-ultra-512, 2x ", "without a machine"),
        ("m3-ultra-512,", "cannot read a machine"),
        ("m4-16", "holds no layer"),
        ("m3-24", "24 GB at most"),
        ("m3-ultra-512-60c", "GPU cores"),
        ("m3-ultra-256-70c", "60 or 80"),
        ("x" * 100_000, "cannot read a machine"),
    ],
)
def test_a_cluster_text_says_what_it_could_not_read(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as error:
        read_cluster(text)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("count", ["2x m3-ultra-512", "2 x m3-ultra-512", "2*m3-ultra-512", "2× m3-ultra-512"])
def test_a_number_of_machines_is_read_in_every_spelling(count: str) -> None:
    assert len(read_cluster(count).machines) == 2


def test_links_of_every_kind_are_priced_and_wifi_warns(tmp_path: Path) -> None:
    kinds = ("wifi", "ethernet1", "ethernet2.5", "ethernet5", "ethernet10", "ethernet25")
    speeds = [link_of_kind(kind).bandwidth_bytes_per_s for kind in kinds]
    assert speeds == sorted(set(speeds))
    for kind in ("thunderbolt3", "thunderbolt4", "usb4", "thunderbolt5", "rdma"):
        assert link_of_kind(kind).bandwidth_bytes_per_s > speeds[-1]
    two = '[[machine]]\nname = "a"\nchip = "m3-ultra"\nmemory = 512\n[[machine]]\nname = "b"\nchip = "m2-ultra"\nmemory = 192\n'
    path = tmp_path / "cluster.toml"
    path.write_text(two + '[[link]]\nbetween = ["a", "b"]\nkind = "wifi"\n')
    answer = plan_answer(model="kimi-k2.6", recipe="q34+q6", cluster=path, split="44,17")
    assert any("use a cable" in text for text in answer.plan.assumptions)
    assert "use a cable" in answer.text
    path.write_text(two + '[[link]]\nbetween = ["a", "b"]\nlatency_s = 1e-4\nbandwidth_bytes_per_s = 4e9\n')
    measured = next(iter(read_cluster(path).links.values()))
    assert measured.handover_s == link_of_kind("ethernet10").handover_s
    assert measured.warning == ""


def test_what_a_mac_says_of_its_gpu_is_read() -> None:
    said = '+-o AGXAcceleratorG15X\\n  | "gpu-core-count" = 60\\n'
    assert gpu_cores_of(said) == 60
    assert gpu_cores_of("") is None
    table = profile_table("Apple M3 Ultra", 256 * GIB, wired_mb=0, gpu_cores=60)
    assert machine_of_profile(table, where="test").prefill == machine_of_name("m3-ultra-256-60c").prefill
