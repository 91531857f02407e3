"""A report has what helps, and nowhere in it a prompt, an answer, a key or a home."""

from __future__ import annotations

import gzip
import json
import stat
import zipfile
from pathlib import Path

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.owner import status
from exo_kimi.owner.asking import ServerToAsk
from exo_kimi.owner.cleaning import Cleaner
from exo_kimi.owner.directories import OwnerDirectories
from exo_kimi.owner.report import ReportOptions, write_report
from exo_kimi.owner.service.install import Services
from exo_kimi.owner.service.manager import Systemd
from exo_kimi.owner.service.spec import ServiceSpec
from tests.owner.test_service import System

PROMPT, ANSWER = "tell me of my divorce, please", "Dear Sir, I am sorry to hear of it"
API_KEY, CLUSTER_KEY, TOKEN = "k-5ecret-of-mine", "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "hf_AbCdEfGhIjKlMnOp"
OWNERS = ("alice", "bob")
HOMES = ("/".join(("", "Users", OWNERS[0])), "/".join(("", "home", OWNERS[1])))
ID = "req_" + "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LOOK_S", 0.0)


def log_of(home: Path) -> str:
    time = "2026-11-28 07:00:00,000"
    fields = {
        "time": "2026-11-28T07:00:00.000Z",
        "level": "ERROR",
        "logger": "x",
        "message": f"task failed: '{PROMPT}'",
    }
    return "\n".join(
        [
            f"{time} INFO {ID} stop: 3 prompt tokens (0 cached), 4 generated, 0.001 s in the queue",
            f"{time} INFO stage 1: WARNING a step failed in {home}/models/kimi",
            f'{time} WARNING refused: found "{PROMPT}"',
            f"  found     {PROMPT}",
            f"{time} ERROR Authorization: Bearer {API_KEY}, EXO_KIMI_KEY={CLUSTER_KEY} and {TOKEN}",
            f"{time} INFO listening with {API_KEY}",
            f"{time} WARNING of {HOMES[0]}/models and {HOMES[1]}/x",
            json.dumps(fields),
            f"exo | TextGeneration(messages=[{PROMPT}]) -> {ANSWER}",
            "Traceback (most recent call last):",
            f'  File "{home}/exo/runner.py", line 7, in run',
            f"    answer = ask({PROMPT!r})",
            f"exo.errors.RunnerError: {ANSWER}",
            ANSWER,
        ]
    )


def test_nothing_of_the_owner_s_is_in_it_and_what_helps_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "homes" / OWNERS[0]
    home.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    make_tiny(home / "kimi")
    directories = OwnerDirectories(services=home / "services", logs=home / "logs", units=home / "units")
    services = Services(directories, Systemd(directories, System("ActiveState=active\nSubState=running\n")))
    for name, text in (("api.key", API_KEY), ("cluster.key", CLUSTER_KEY)):
        (home / name).write_text(text + "\n")
        (home / name).chmod(0o600)
    (home / "plan.json").write_text(json.dumps({"made_for": f"{home}/kimi", "split": "5,2"}))
    words = (
        "serve",
        f"{home}/kimi",
        "--api-key-file",
        "api.key",
        "--key-file",
        f"{home}/cluster.key",
        "--plan",
        "plan.json",
    )
    ServiceSpec(name="serve", words=words, directory=str(home), environment={"HF_TOKEN": "hf-tok"}).write(
        directories.services
    )
    directories.logs.mkdir()
    (directories.logs / "serve.log").write_text(log_of(home))
    (home / "serve.log").write_text(log_of(home))
    (home / f"{PROMPT}.gz").write_bytes(gzip.compress(log_of(home).encode()))
    (home / f"{OWNERS[0]} {API_KEY}.json.gz").write_bytes(gzip.compress(f'"{API_KEY} {home}"'.encode()))
    (home / "verify.json").write_text(json.dumps({"exo_kimi_verify": 1, "found": f"read {home}/kimi"}))
    output = tmp_path / "report.zip"
    options = ReportOptions(
        output=output,
        enclosed=(home / "verify.json", home / f"{OWNERS[0]} {API_KEY}.json.gz"),
        logs=(home / "serve.log", home / f"{PROMPT}.gz"),
        server=ServerToAsk(url="http://127.0.0.1:9", key=API_KEY),
    )
    names = write_report(options, services, {"EXO_KIMI_API_KEY": API_KEY})
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    with zipfile.ZipFile(output) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert sorted(texts) == names
    everything = "\n".join([*texts, *texts.values()])
    words_of_theirs = {*PROMPT.split(), *ANSWER.split()} - {"me", "of", "my", "I", "am", "to", "it", "sorry"}
    for secret in (PROMPT, ANSWER, API_KEY, CLUSTER_KEY, TOKEN, "hf-tok", str(home), *OWNERS, *words_of_theirs):
        assert secret not in everything, secret
    assert output.read_bytes().count(b"\x1f\x8b\x08") == 0, "nothing packed within, which nobody looked into"
    for log in (texts["logs/serve.log"], texts["logs/given-1.log"], texts["logs/given-2.log"]):
        assert f"{ID} stop: 3 prompt tokens" in log
        assert "WARNING a step failed in ~/models/kimi" in log
        assert "task failed: '<29 characters>'" in log
        assert "exo.errors.RunnerError\n" in log
        assert 'File "~/exo/runner.py", line 7, in run' in log
        assert "[4 lines that are not exo-kimi's were left out]" in log
    assert "exo-kimi " in texts["status.txt"] and "active (running)" in texts["status.txt"]
    assert '"split": "5,2"' in texts["plans/serve.json"]
    assert "layers" in texts["doctor/serve.txt"]
    assert "~/kimi" in texts["enclosed/1.txt"]
    assert texts["enclosed/2.txt"] == '"<key> ~"\n'
    assert "no exo-kimi server answers" in texts["server.txt"]


def test_of_a_long_log_its_end_is_taken(tmp_path: Path) -> None:
    lines = "".join(f"2026-11-28 07:00:00,000 INFO line {number} {'x' * 90}\n" for number in range(60_000))
    (tmp_path / "long.log").write_text(lines)
    directories = OwnerDirectories(services=tmp_path / "s", logs=tmp_path / "l", units=tmp_path / "u")
    options = ReportOptions(
        output=tmp_path / "r.zip", lines=3, logs=(tmp_path / "long.log",), server=ServerToAsk(url="http://127.0.0.1:9")
    )
    write_report(options, Services(directories, Systemd(directories, System())), {})
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        found = archive.read("logs/given-1.log").decode().splitlines()
    assert [line.split()[4] for line in found] == ["59997", "59998", "59999"]


def test_a_server_s_words_are_cleaned_too(tmp_path: Path) -> None:
    found = Cleaner(["abcd"], tmp_path).values(
        {"events": [f'RequestError: found "{PROMPT}"', "abcd"], "stages": [{"last_error": f"in {tmp_path}/x"}], "n": 1}
    )
    assert found == {
        "events": ["RequestError: found '<29 characters>'", "<key>"],
        "stages": [{"last_error": "in ~/x"}],
        "n": 1,
    }


def test_what_cannot_be_read_or_written_is_one_message(tmp_path: Path) -> None:
    directories = OwnerDirectories(services=tmp_path / "s", logs=tmp_path / "l", units=tmp_path / "u")
    services = Services(directories, Systemd(directories, System()))
    server = ServerToAsk(url="http://127.0.0.1:9")
    gone = ReportOptions(output=tmp_path / "r.zip", enclosed=(tmp_path / "gone",), server=server)
    with pytest.raises(UsageError, match="cannot read the file"):
        write_report(gone, services, {})
    (tmp_path / "zip").write_bytes(b"PK\x03\x04\0\0")
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"a text" * 1000)[:40])
    for name, words in (("zip", "not a text"), ("half.gz", "cannot read the file")):
        for given in ({"enclosed": (tmp_path / name,)}, {"logs": (tmp_path / name,)}):
            with pytest.raises(UsageError, match=words):
                write_report(ReportOptions(output=tmp_path / "r.zip", server=server, **given), services, {})
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(ReportOptions(output=tmp_path / "no" / "r.zip", server=server), services, {})


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("layers 0:44 are ready", "layers 0:44 are ready"),
        ("POST '/v1/chat/completions' 200", "POST '/v1/chat/completions' 200"),
        ("said 'a word or two'", "said '<13 characters>'"),
        ("x-api-key: abcdefgh", "<key>"),
        ("OPENAI_TOKEN=abc def", "<key> def"),
    ],
)
def test_messages_keep_what_is_no_secret(text: str, clean: str) -> None:
    assert Cleaner((), Path("/root")).message(text) == clean
