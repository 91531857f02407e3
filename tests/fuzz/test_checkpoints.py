"""Whatever a checkpoint's files hold, reading them is a value or one of our errors, in bounded time."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.rendering.messages import RenderFailure, pack_failure, pack_text, unpack_answer
from exo_kimi.checkpoint.rendering.pool import shared_pool
from exo_kimi.checkpoint.safetensors_io import read_header
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoKimiError

pytestmark = pytest.mark.fuzz
JSON_FILES = ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("fuzz") / "tiny", template="k25", prefix=True)


def told(error: ExoKimiError) -> None:
    """An error that can be printed, and in a few lines."""
    assert len(str(error).encode("utf-8", "backslashreplace")) < 20_000


def test_safetensors_headers(fuzz: Any, checkpoint: Path, tmp_path: Path) -> None:
    whole = next(checkpoint.glob("*.safetensors")).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    small = dict(list(header.items())[:6])
    file = tmp_path / "model.safetensors"

    def check(text: bytes) -> None:
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        _, _, problems = read_header(file)
        for problem in problems:
            told(problem)

    fuzz.run(fuzz.texts([small], ["__metadata__", "dtype", "shape", "data_offsets"]), check)

    def check_bytes(data: bytes) -> None:
        file.write_bytes(data)
        read_header(file)

    fuzz.run(fuzz.bytes([whole[: 8 + 400], len(b"{}").to_bytes(8, "little") + b"{}"]), check_bytes)


def test_config_json(fuzz: Any, checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    seeds = [raw, {**raw["text_config"]}]

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            return
        try:
            KimiConfig.from_dict(value, where="config.json")
        except ExoKimiError as error:
            told(error)

    words = ["quantization", "rope_scaling", "text_config", "quantization_config", "model_type", "bits", "group_size"]
    fuzz.run(fuzz.values(seeds, words), check)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_the_doctor_and_the_speaker_on_json_files(fuzz: Any, checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    sound = file.read_bytes()
    seed = json.loads(sound)
    if name == "tokenizer_config.json":
        entries = seed["added_tokens_decoder"]
        seed["added_tokens_decoder"] = dict(list(entries.items())[:20])
    if name == "model.safetensors.index.json":
        seed["weight_map"] = dict(list(seed["weight_map"].items())[:20])

    def check(text: bytes) -> None:
        file.write_bytes(text)
        diagnosis = doctor(checkpoint)
        json.loads(diagnosis.to_json())
        diagnosis.to_text().encode()
        try:
            Speaker.from_directory(checkpoint)
        except ExoKimiError as error:
            told(error)

    try:
        words = [
            "auto_map",
            "model_file",
            "chat_template",
            "eos_token_id",
            "quantization",
            "metadata",
            "total_size",
            "content",
        ]
        fuzz.run(fuzz.texts([seed], words), check, few=15)
    finally:
        file.write_bytes(sound)


def test_the_ranks_of_a_tokenizer(fuzz: Any, checkpoint: Path) -> None:
    file = checkpoint / "tiktoken.model"
    sound = file.read_bytes()

    def check(data: bytes) -> None:
        file.write_bytes(data)
        diagnosis = doctor(checkpoint)
        diagnosis.to_text().encode()
        try:
            Speaker.from_directory(checkpoint)
        except ExoKimiError as error:
            told(error)

    try:
        fuzz.run(fuzz.bytes([sound, sound[:200]]), check, few=15)
    finally:
        file.write_bytes(sound)


def test_chat_templates(fuzz: Any, checkpoint: Path) -> None:
    """The process outlives them or is replaced, and says why."""
    sound = (checkpoint / "chat_template.jinja").read_bytes()
    variables = {"messages": [{"role": "user", "content": "Hi"}], "tools": None, "add_generation_prompt": True}

    def check(data: bytes) -> None:
        try:
            shared_pool().render(data.decode("utf-8", "replace"), variables)
        except RenderFailure as failure:
            assert failure.found is not None

    fuzz.run(
        fuzz.bytes([sound, b"{% for i in range(9) %}{{ i * 3 }}{% endfor %}", b"{{ messages[0].content|upper }}"]),
        check,
    )


def test_answers_of_a_render_process(fuzz: Any) -> None:
    def check(data: bytes) -> None:
        with contextlib.suppress(RenderFailure, ValueError, TypeError):
            unpack_answer(data)

    fuzz.run(fuzz.bytes([pack_text("some text é"), pack_failure(RenderFailure("failed", "why", 3))]), check)
