"""What is remembered of pairings: a file of the user's, names that are unique, and addresses by name."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from exo_kimi.errors import UsageError
from exo_kimi.pairing import command
from exo_kimi.pairing.command import cluster_forget, cluster_status, paired_serve, stage_place
from exo_kimi.pairing.members import PairedMachine, members_file, read_members, stage_addresses, write_members
from exo_kimi.runtime.transport.keys import ClusterKey, default_key_file


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EXO_KIMI_KEY", raising=False)


def machine(id: str, name: str = "mini", address: str = "127.0.0.1:9") -> PairedMachine:
    return PairedMachine(id=id, name=name, address=address, paired="2026-11-28")


def test_it_is_kept_for_the_user_alone() -> None:
    members = read_members().with_machine(machine("a")).with_machine(machine("b"))
    write_members(members)
    assert read_members() == members
    assert [each.name for each in members.machines] == ["mini", "mini-2"]
    assert stat.S_IMODE(members_file().stat().st_mode) == 0o600


def test_a_machine_that_pairs_again_is_the_same_machine() -> None:
    members = read_members().with_machine(machine("a")).with_machine(machine("a", address="127.0.0.1:10"))
    assert [each.address for each in members.machines] == ["127.0.0.1:10"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "id": 1, "listen": "", "machines": [{}]}']
)
def test_a_damaged_file_is_one_message(text: str) -> None:
    members_file().parent.mkdir(parents=True)
    members_file().write_text(text)
    with pytest.raises(UsageError, match="cannot read which machines were paired"):
        read_members()


def test_names_are_addresses_where_a_stage_is_wanted() -> None:
    write_members(read_members().with_machine(machine("a")).with_machine(machine("b", "studio", "")))
    found = stage_addresses(["10.0.0.2:1", "mini", "[fe80::1%en5]:2"], find=lambda each: each.address)
    assert found == ["10.0.0.2:1", "127.0.0.1:9", "[fe80::1%en5]:2"]
    for name in ("studio", "nobody"):
        with pytest.raises(UsageError, match=f"no stage {name} was paired") as error:
            stage_addresses([name], find=lambda each: each.address)
        assert "mini" in str(error.value.expected)


def test_a_stage_that_moved_is_found_by_its_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    write_members(read_members().with_machine(machine("a")))
    moved = command.Address("127.0.0.1", 10)
    monkeypatch.setattr(command, "find_stages", lambda **asked: [asked["id"]])
    monkeypatch.setattr(command, "nearest", lambda stage: moved if stage == "a" else None)
    assert paired_serve(["mini"], None, key_file=None).stages == ("127.0.0.1:10",)
    assert read_members().machines[0].address == "127.0.0.1:10"


def test_status_and_forget(capsys: pytest.CaptureFixture[str]) -> None:
    assert "with nobody" in cluster_status() and "none: `exo-kimi stage --pair` makes one" in cluster_status()
    key = ClusterKey.generate()
    key.write(default_key_file())
    write_members(read_members().with_machine(machine("a")).with_machine(machine("b", "studio", "")))
    status = cluster_status()
    assert "mini: stage at 127.0.0.1:9, does not answer (since 2026-11-28)" in status and "studio: serves" in status
    assert key.secret.decode() not in status and key.public.decode()[:8] in status
    with pytest.raises(UsageError, match="no machine of this name"):
        cluster_forget("max")
    assert "forgot mini" in cluster_forget("mini")
    assert default_key_file().exists() and [each.name for each in read_members().machines] == ["studio"]
    assert "forgot 1 machines and the cluster key" in cluster_forget(None)
    assert not default_key_file().exists() and not members_file().exists()


def test_a_stage_without_an_address_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="where is the stage to listen"):
        stage_place(None, pair=False, key_file=None)
    assert stage_place("127.0.0.1:1", pair=False, key_file=None).key_file is None
