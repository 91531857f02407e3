"""`pull` against the hub's stand-in: the right bytes and no more, resumed at any byte, or one clear message."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import killed_pull
import mlx.core as mx
import pytest
from hub_stand_in import Fault, HubStandIn
from mlx.utils import tree_flatten

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import (
    DamagedWeightsError,
    FetchError,
    MachineError,
    MissingTensorError,
    TensorFileError,
    UsageError,
)
from exo_kimi.fetch import hub as hub_module
from exo_kimi.fetch import part as part_module
from exo_kimi.fetch import pull as pull_module
from exo_kimi.fetch import transfer
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.pull import PullOptions, PullReport, pull
from exo_kimi.runtime.loading.loader import load

Hub = Callable[..., HubStandIn]
SHARE = PullOptions(layers=(3, 7))


def fetch(served: HubStandIn, directory: Path, options: PullOptions = SHARE) -> PullReport:
    return pull(HubSource(served.model, endpoint=served.url), directory, options)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def check_share(directory: Path, whole: Path) -> None:
    """The share of layers 3:7, healthy to the last byte, and known as the same checkpoint's."""
    diagnosis = doctor(directory, deep=True)
    assert diagnosis.healthy, diagnosis.to_text()
    share, full = Checkpoint(directory), Checkpoint(whole)
    assert share.fingerprint == full.fingerprint
    assert stage_fingerprint(share.manifest(0, 3)) == stage_fingerprint(full.manifest(0, 3))
    ours, theirs = load(directory, 3, 7), load(whole, 3, 7)
    for (name, one), (_, other) in zip(tree_flatten(ours.parameters()), tree_flatten(theirs.parameters()), strict=True):
        assert mx.array_equal(one, other), name


def test_the_whole_model_is_the_hubs_files_byte_by_byte(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole)
    report = fetch(served, tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)
    assert report.fetched_bytes == sum(map(len, files(whole).values()))
    assert report.cut == () and report.kept == ()
    assert "SHA-256 of 5 of 5 weight files" in doctor(tmp_path / "here", deep=True).to_text()


def test_a_share_loads_strictly_and_costs_its_bytes(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole)
    report = fetch(served, tmp_path / "here")
    check_share(tmp_path / "here", whole)
    share = Checkpoint(whole).manifest(3, 7).disk_bytes
    texts = sum(
        size for name, size in ((n, len(d)) for n, d in files(whole).items()) if not name.endswith(".safetensors")
    )
    headers = sum(int.from_bytes(d[:8], "little") + 8 for n, d in files(whole).items() if n.endswith(".safetensors"))
    assert served.sent_bytes <= 1.01 * (share + 2 * texts + headers)
    assert report.cut and not set(report.cut) >= {n for n in files(whole) if n.endswith(".safetensors")}
    with pytest.raises(MissingTensorError, match="without layers 0:3"):
        load(tmp_path / "here")


def test_a_second_pull_fetches_nothing_and_more_layers_only_their_bytes(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole)
    here = tmp_path / "here"
    fetch(served, here)
    assert fetch(served, here).fetched_bytes == 0
    before = served.sent_bytes
    report = fetch(served, here, PullOptions())
    share = Checkpoint(whole).manifest(3, 7).disk_bytes
    assert served.sent_bytes - before == report.fetched_bytes
    assert report.fetched_bytes < sum(map(len, files(whole).values())) - 0.99 * share
    assert files(here) == files(whole)


def test_whole_files_are_verified_and_never_cut(hub: Hub, whole: Path, tmp_path: Path) -> None:
    report = fetch(hub(whole), tmp_path / "here", PullOptions(layers=(3, 7), whole_files=True))
    for name in {n for n in files(whole) if n.endswith(".safetensors")} - set(report.cut):
        assert files(tmp_path / "here")[name] == files(whole)[name]
    check_share(tmp_path / "here", whole)


def test_a_dry_run_says_the_bytes_and_fetches_headers_only(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole)
    told = fetch(served, tmp_path / "here", PullOptions(layers=(3, 7), dry_run=True))
    assert not (tmp_path / "here").exists()
    assert served.sent_bytes < 0.2 * told.fetched_bytes
    assert fetch(served, tmp_path / "here").fetched_bytes == told.fetched_bytes


def test_killed_at_random_points_it_reads_at_most_the_share_and_one_percent(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill costs what a connection has read and not yet counted, 64 KiB at most: with one connection and 8 kills that is
    less than 1 % of this share on any machine. `FETCH_KILLS=30` has 8 connections, as `pull` has, and the same bar."""
    kills = int(os.environ.get("FETCH_KILLS", "8"))
    config = {"n_routed_experts": 8, "moe_intermediate_size": 512, "hidden_size": 512}
    whole = make_tiny(tmp_path / "whole", shards=5, layout="bf16", config=config)
    once = hub(whole)
    share = fetch(once, tmp_path / "once").size_bytes
    small = once.sent_bytes - share  # what is read for planning and is no part of the share
    shutil.rmtree(tmp_path / "cache")
    assert share > 55e6 and small < 0.002 * share

    served = hub(whole, bytes_per_s=30e6 if kills <= 8 else 4e6)
    counter, here, chance = tmp_path / "counter", tmp_path / "here", random.Random(20)
    counter.write_bytes(bytes(8))
    puller = subprocess.Popen(
        [sys.executable, killed_pull.__file__, served.url, str(here), str(counter), "1" if kills <= 8 else "8"],
        env={**os.environ, "NO_PROXY": "*"},  # macOS asks a framework that does not live through a fork
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def count() -> int:
        return int.from_bytes(counter.read_bytes(), "little")

    try:
        for wanted in sorted(chance.sample(range(int(0.95 * share)), kills)):
            puller.stdin.write("pull\n")
            child = int(puller.stdout.readline())
            while count() < wanted:
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            assert int(puller.stdout.readline()) == signal.SIGKILL
        puller.stdin.write("pull\n")
        puller.stdout.readline()
        assert puller.stdout.readline() == "0\n"
    finally:
        puller.stdin.close()
        puller.wait(20)
    assert files(here) == files(tmp_path / "once")
    assert doctor(here, deep=True).healthy
    read, sent = (100 * (bytes_ - small) / share - 100 for bytes_ in (count(), served.sent_bytes))
    assert 0 <= read < 1, (read, sent)
    print(f"{kills} kills of {share / 1e6:.1f} MB: client read {read:+.3f} %, server sent {sent:+.3f} %")


def test_a_wrong_byte_is_fetched_again(hub: Hub, whole: Path, tmp_path: Path) -> None:
    spoilt: list[str] = []

    def fault(name: str, number: int) -> Fault | None:
        if name == "model-00002-of-00005.safetensors" and not spoilt:
            spoilt.append(name)
            return Fault(flip_at=500_000)
        return None

    fetch(hub(whole, fault=fault), tmp_path / "here", PullOptions())
    assert spoilt and files(tmp_path / "here") == files(whole)


def test_a_byte_that_stays_wrong_is_one_message_and_no_file(hub: Hub, whole: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00005.safetensors"
    served = hub(whole, fault=lambda file, number: Fault(flip_at=500_000) if file == name else None)
    with pytest.raises(DamagedWeightsError, match="another content than was listed, twice"):
        fetch(served, tmp_path / "here", PullOptions())
    assert not (tmp_path / "here" / name).exists()
    served.fault = lambda file, number: None
    fetch(served, tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)


def test_a_text_that_comes_wrong_is_refused(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole, fault=lambda file, number: Fault(flip_at=3) if file == "config.json" else None)
    with pytest.raises((TensorFileError, DamagedWeightsError), match=r"config\.json came with another content"):
        fetch(served, tmp_path / "here")


def test_broken_connections_and_server_faults_are_tried_again(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "WAIT_S", 0.01)
    chance = random.Random(1)

    def fault(name: str, number: int) -> Fault | None:
        what = chance.randrange(6)
        if what == 0:
            return Fault(cut_after=chance.randrange(0, 200_000))
        return (
            Fault(status=503) if what == 1 else Fault(status=429, headers={"Retry-After": "0"}) if what == 2 else None
        )

    fetch(hub(whole, fault=fault), tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)


@pytest.mark.parametrize(
    ("status", "headers", "what", "fix"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "access to org/kimi must be asked for", "HF_TOKEN"),
        (403, {}, "the hub refused", "the token has no right"),
        (401, {}, "the hub refused", "hf auth login"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no model org/kimi at the hub, or it is private", "hf auth login"),
        (429, {}, "the hub refused", "wait some minutes"),
        (500, {}, "the hub refused", "goes on where it was"),
    ],
)
def test_a_refused_list_is_one_clear_message(
    hub: Hub, whole: Path, tmp_path: Path, status: int, headers: dict[str, str], what: str, fix: str
) -> None:
    served = hub(whole, listing_fault=Fault(status=status, headers=headers))
    with pytest.raises(FetchError, match=what) as error:
        fetch(served, tmp_path / "here")
    assert fix in str(error.value.fix) and str(status) in str(error.value.found)


@pytest.mark.parametrize(("asked", "tries"), [("0", 3), ("3600", 1)])
def test_a_busy_list_is_asked_again_when_the_hub_says_when(
    hub: Hub, whole: Path, tmp_path: Path, asked: str, tries: int
) -> None:
    served = hub(whole, listing_fault=Fault(status=429, headers={"Retry-After": asked}))
    with pytest.raises(FetchError, match="the hub refused") as error:
        fetch(served, tmp_path / "here")
    assert served.listings == tries
    assert f"wait {asked} s, as it asks for, and run the same command again" in str(error.value.fix)
    served.listing_fault = None
    assert fetch(served, tmp_path / "here").fetched_bytes


def test_403_of_a_file_ends_it_and_what_came_is_kept(hub: Hub, whole: Path, tmp_path: Path) -> None:
    name = "model-00005-of-00005.safetensors"
    served = hub(whole, fault=lambda file, number: Fault(status=403) if file == name else None)
    with pytest.raises(FetchError, match="the hub refused"):
        fetch(served, tmp_path / "here", PullOptions(connections=1))
    before = served.sent_bytes
    served.fault = lambda file, number: None
    told = fetch(served, tmp_path / "here", PullOptions(dry_run=True))
    report = fetch(served, tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)
    assert served.sent_bytes - before == report.fetched_bytes == told.fetched_bytes < 0.5 * before


def test_429_for_ever_is_one_clear_message(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "WAIT_S", 0.001)
    served = hub(whole, fault=lambda file, number: Fault(status=429) if "model-" in file else None)
    with pytest.raises(FetchError, match=r"does not come") as error:
        fetch(served, tmp_path / "here", PullOptions())
    assert "too many requests" in str(error.value)


def test_no_hub_and_no_such_model_are_said(hub: Hub, whole: Path, tmp_path: Path) -> None:
    served = hub(whole)
    with pytest.raises(FetchError, match="no model org/other"):
        pull(HubSource("org/other", endpoint=served.url), tmp_path / "here", SHARE)
    with pytest.raises(FetchError, match="has no revision v9"):
        pull(HubSource(served.model, revision="v9", endpoint=served.url), tmp_path / "here", SHARE)
    with pytest.raises(FetchError, match="cannot be reached"):
        pull(HubSource(served.model, endpoint="http://127.0.0.1:9"), tmp_path / "here", SHARE)


def test_no_room_is_said_before_a_byte_comes(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    served = hub(whole)
    with pytest.raises(MachineError, match="the disk has no room") as error:
        fetch(served, tmp_path / "here", PullOptions())
    assert served.sent_bytes == 0 and "short" in str(error.value)


def test_a_disk_that_fills_up_is_one_message_and_it_goes_on(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = 0, part_module._write_at

    def full(descriptor: int, data: bytes, position: int) -> None:
        nonlocal written
        written += len(data)
        if written > 2_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data, position)

    monkeypatch.setattr(part_module, "_write_at", full)
    served = hub(whole)
    with pytest.raises(MachineError, match="the disk is full"):
        fetch(served, tmp_path / "here", PullOptions())
    monkeypatch.setattr(part_module, "_write_at", write)
    report = fetch(served, tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)
    assert report.fetched_bytes < sum(map(len, files(whole).values())) - 1_000_000


def test_other_files_of_the_same_names_are_never_overwritten(hub: Hub, whole: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.json").write_text("{}")
    (here / "model-00001-of-00005.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is here already and is not the source's"):
        fetch(hub(whole), here)
    (here / "model-00001-of-00005.safetensors").unlink()
    assert fetch(hub(whole), here, PullOptions()).kept == ("config.json",)
    assert (here / "config.json").read_text() == "{}"


def test_files_that_were_copied_by_hand_are_verified_and_not_fetched(hub: Hub, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "here")
    name = "model-00003-of-00005.safetensors"
    (tmp_path / "here" / name).unlink()
    report = fetch(hub(whole), tmp_path / "here", PullOptions())
    assert report.fetched_bytes == len((whole / name).read_bytes())
    damaged = bytearray((whole / name).read_bytes())
    damaged[-1] ^= 1
    shutil.rmtree(tmp_path / "here" / ".cache")
    (tmp_path / "here" / name).write_bytes(damaged)
    with pytest.raises(UsageError, match="is not the source's"):
        fetch(hub(whole), tmp_path / "here", PullOptions())


def test_cuts_of_other_weights_are_not_mixed(hub: Hub, whole: Path, tmp_path: Path) -> None:
    """The same names, shapes and sizes; other numbers."""
    fetch(hub(whole), tmp_path / "here")
    shutil.copytree(whole, tmp_path / "tuned")
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(UsageError, match="is not the source's"):
        fetch(hub(tmp_path / "tuned"), tmp_path / "here")


def test_two_pulls_into_one_directory_are_refused(hub: Hub, whole: Path, tmp_path: Path) -> None:
    work = tmp_path / "here" / ".cache" / "exo-kimi"
    work.mkdir(parents=True)
    with pull_module._alone(work), pytest.raises(UsageError, match="another pull is at work"):
        fetch(hub(whole), tmp_path / "here")


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "build_hf_headers", lambda **_: {"authorization": "Bearer secret"})
    served = hub(whole)
    fetch(served, tmp_path / "here", PullOptions())
    assert {seen.split()[0] for seen in served.tokens if "secret" in seen} >= {"org"}


def test_names_that_lead_elsewhere_and_code_are_not_fetched(hub: Hub, whole: Path, tmp_path: Path) -> None:
    odd = {"tokenization_kimi.py": whole / "config.json", ".hidden.json": whole / "config.json"}
    odd |= {"sub/model.safetensors": whole / "config.json", "weights.bin": whole / "config.json"}
    served = hub({path.name: path for path in whole.iterdir()} | odd)
    fetch(served, tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)


def test_a_share_notes_hashes_of_its_cut_files(hub: Hub, whole: Path, tmp_path: Path) -> None:
    report = fetch(hub(whole), tmp_path / "here")
    cut = tmp_path / "here" / report.cut[-1]
    data = bytearray(cut.read_bytes())
    data[-3] ^= 1
    cut.write_bytes(data)
    diagnosis = doctor(tmp_path / "here", deep=True)
    assert [finding.error.what for finding in diagnosis.findings if "SHA-256" in str(finding.error)]
    assert not diagnosis.healthy


def test_layers_that_come_later_leave_those_that_are_here(hub: Hub, whole: Path, tmp_path: Path) -> None:
    """A file that is cut for both is cut for both together."""
    served = hub(whole)
    for layers in ((3, 7), (0, 2), (2, 3)):
        fetch(served, tmp_path / "here", PullOptions(layers=layers))
        Checkpoint(tmp_path / "here").manifest(3, 7).check_here()
        assert doctor(tmp_path / "here", deep=True).healthy
    assert {n: d for n, d in files(whole).items() if n.endswith(".safetensors")}.items() <= files(
        tmp_path / "here"
    ).items()
