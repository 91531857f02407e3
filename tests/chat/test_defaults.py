"""Generation defaults come from the checkpoint, else from its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.chat.defaults import GenerationDefaults, SamplingDefaults
from exo_kimi.chat.family import family_of
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.errors import TokenizerError


def defaults(directory: Path) -> GenerationDefaults:
    return GenerationDefaults.from_directory(directory, KimiTokenizer.from_directory(directory))


def write(directory: Path, name: str, **content: Any) -> None:
    (directory / name).write_text(json.dumps(content))


def test_an_instruct_model_is_cool_and_does_not_think(plain_directory: Path) -> None:
    found = defaults(plain_directory)
    assert found.family == "instruct"
    assert found.sampling() == SamplingDefaults(temperature=0.6)
    assert not found.thinks_by_default


def test_a_thinking_model_is_warm(fresh_directory: Path) -> None:
    assert defaults(fresh_directory).family == "thinking"
    assert defaults(fresh_directory).sampling() == SamplingDefaults(temperature=1.0)


def test_k25_cools_down_when_it_does_not_think(fresh_directory: Path) -> None:
    write(fresh_directory, "config.json", model_type="kimi_k25", text_config={"max_position_embeddings": 262144})
    (fresh_directory / "generation_config.json").unlink()
    found = defaults(fresh_directory)
    assert found.family == "k25"
    assert found.sampling() == found.sampling(True) == SamplingDefaults(temperature=1.0, top_p=0.95)
    assert found.sampling(False) == SamplingDefaults(temperature=0.6, top_p=0.95)
    assert found.max_context == 262144


def test_the_checkpoints_own_word_wins(fresh_directory: Path) -> None:
    write(fresh_directory, "generation_config.json", temperature=0.3, top_p=0.5, max_length=1000)
    found = defaults(fresh_directory)
    assert found.sampling() == found.sampling(False) == SamplingDefaults(temperature=0.3, top_p=0.5)
    assert found.max_context == 1000


def test_the_context_is_unknown_when_nobody_says(fresh_directory: Path) -> None:
    (fresh_directory / "generation_config.json").unlink()
    (fresh_directory / "config.json").unlink()
    assert defaults(fresh_directory).max_context is None
    assert family_of({}, KimiTokenizer.from_directory(fresh_directory)) == "thinking"


@pytest.mark.parametrize("changes", [{"temperature": "warm"}, {"temperature": -1}, {"top_p": 1.5}, {"top_p": True}])
def test_values_out_of_range_are_an_error(changes: dict[str, Any], fresh_directory: Path) -> None:
    write(fresh_directory, "generation_config.json", **changes)
    with pytest.raises(TokenizerError, match="out of range"):
        defaults(fresh_directory)
