"""A report has what helps, and nowhere in it a prompt, an answer, a key or a home."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.owner import status
from exo_kimi.owner.cleaning import Cleaner
from exo_kimi.owner.directories import OwnerDirectories
from exo_kimi.owner.report import ReportOptions, write_report
from exo_kimi.owner.service.install import Services
from exo_kimi.owner.service.manager import Systemd
from exo_kimi.owner.service.spec import ServiceSpec
from exo_kimi.owner.status import ServerToAsk
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
    (home / "by-hand.log").write_text(log_of(home))
    (home / "verify.json").write_text(json.dumps({"exo_kimi_verify": 1, "found": f"read {home}/kimi"}))
    output = tmp_path / "report.zip"
    options = ReportOptions(
        output=output,
        enclosed=(home / "verify.json",),
        logs=(home / "by-hand.log",),
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
    for log in (texts["logs/serve.log"], texts["logs/by-hand.log"]):
        assert f"{ID} stop: 3 prompt tokens" in log
        assert "WARNING a step failed in ~/models/kimi" in log
        assert "task failed: '<29 characters>'" in log
        assert "exo.errors.RunnerError\n" in log
        assert 'File "~/exo/runner.py", line 7, in run' in log
        assert "[4 lines that are not exo-kimi's were left out]" in log
    assert "exo-kimi " in texts["status.txt"] and "active (running)" in texts["status.txt"]
    assert '"split": "5,2"' in texts["plans/serve.json"]
    assert "layers" in texts["doctor/serve.txt"]
    assert "~/kimi" in texts["enclosed/verify.json"]
    assert "no server answers" in texts["server.txt"]


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
