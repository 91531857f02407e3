"""Speakers of tiny checkpoints: one that does not reason, one whose prompts open the reasoning, one that shows its messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker


def speaker_of(directory: Path, template: str) -> Speaker:
    return Speaker.from_directory(make_tiny(directory, config={"num_hidden_layers": 2}, template=template))


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return speaker_of(tmp_path_factory.mktemp("instruct") / "tiny", "instruct")


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return speaker_of(tmp_path_factory.mktemp("k25") / "tiny", "k25")


@pytest.fixture(scope="session")
def printer(speaker: Speaker) -> Speaker:
    """Its template shows all that it is given."""
    source = "{{ tools | tojson }}{{ messages | tojson }}"
    return replace(speaker, template=ChatTemplate(speaker.tokenizer, CompiledTemplate(source, "test")))


@pytest.fixture(params=["speaker", "thinker", "printer"])
def either(request: pytest.FixtureRequest) -> Speaker:
    found: Speaker = request.getfixturevalue(request.param)
    return found
