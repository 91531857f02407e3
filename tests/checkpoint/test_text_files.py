"""The JSON files of a checkpoint: read with a byte order mark too, and refused by name when they are not JSON."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exo_kimi.chat.defaults import GenerationDefaults
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.text_files import read_json, read_kimi_config
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ConfigError, ExoKimiError, NotACheckpointError

Make = Callable[..., Path]


@pytest.fixture
def marked(make: Make) -> Path:
    """A checkpoint whose every JSON file begins with a byte order mark."""
    directory = make(shards=2)
    files = sorted(directory.glob("*.json"))
    assert len(files) == 4
    for file in files:
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    return directory


def test_a_byte_order_mark_is_skipped_in_every_json_file(marked: Path) -> None:
    assert open_index(marked).config == read_kimi_config(marked)
    assert not inspect(marked).problems
    tokenizer = KimiTokenizer.from_directory(marked)
    assert GenerationDefaults.from_directory(marked, tokenizer).max_context
    assert ChatTemplate.from_directory(marked, tokenizer).render([{"role": "user", "content": "hi"}]).ids


def test_the_doctor_warns_of_a_mark_in_config_json_and_removes_it(marked: Path) -> None:
    diagnosis = doctor(marked)
    assert diagnosis.healthy
    assert [finding.error.what for finding in diagnosis.warnings] == ["config.json begins with a byte order mark"]
    assert not repair(marked).findings
    assert not (marked / "config.json").read_bytes().startswith(codecs.BOM_UTF8)


@pytest.mark.parametrize("content", [b"[1, 2", b"\xff\xfe{}", b"[" * 100_000, codecs.BOM_UTF8])
def test_what_is_not_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r".+"):
        read_json(tmp_path / "x.json")


def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no such"):
        read_kimi_config(tmp_path / "absent")
    with pytest.raises(NotACheckpointError, match=r"config\.json"):
        read_kimi_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_kimi_config(tmp_path)


# What is no regular file, or never ends: the two that a user can make by accident, and one that an attacker would.
READ_FILES = ["config.json", "chat_template.jinja", "tokenizer_config.json", "tiktoken.model", "generation_config.json"]


@pytest.mark.parametrize("name", [*READ_FILES, "model-*.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_refused_at_once(make: Make, name: str, kind: str) -> None:
    """A pipe without a writer made every command wait for ever, /dev/zero filled the memory."""
    directory = make(shards=2)
    file = next(iter(directory.glob(name)), directory / name)
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    diagnosis = doctor(directory)
    said = "\n".join(str(finding.error) for finding in diagnosis.findings)
    assert not diagnosis.healthy, said
    with pytest.raises(ExoKimiError) as error:
        Speaker.from_directory(directory)
        Checkpoint(directory).manifest()
    for text in (said, str(error.value)):
        assert ("a directory" if kind == "directory" else f"it is a {kind}, not a regular file") in text.replace(
            "Is a", "a"
        )


def test_a_file_without_end_is_read_up_to_the_bound(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(2**40)  # sparse: it takes no room
    with pytest.raises(ConfigError, match="it has over 134217728 bytes"):
        read_kimi_config(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: data.decode().encode("utf-16"), "UTF-16"),
        (lambda data: data.decode().encode("utf-16-le"), "UTF-16"),
        (lambda data: data.decode().encode("utf-32"), "UTF-16 or UTF-32"),
        (lambda data: data + b"\n}} trailing", "text after the end of its JSON"),
        (lambda data: data + data, "text after the end of its JSON"),
    ],
)
def test_every_json_file_says_what_it_is_in_or_what_comes_after_its_end(
    make: Make, name: str, damage: Callable[[bytes], bytes], word: str
) -> None:
    directory = make(shards=2)
    path = directory / name
    path.write_bytes(damage(path.read_bytes()))
    found = [finding.error for finding in doctor(directory).findings if word in str(finding.error)]
    assert len(found) == 1, doctor(directory).to_text()
    assert str(found[0].where).endswith(name)
