"""exo's own API code, without nodes, asked on every route: every error is words and a status (b5375f8ce and v1.0.71).

EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python -m pytest tests/plugin/api -m exo
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.bench.setups.exo_here import REPOSITORY, ExoHere
from exo_kimi.plugin.control.prepare import prepare

pytestmark = [pytest.mark.exo, pytest.mark.timeout(200)]
# script -> (status, words) of an answer that is nothing but the error
REFUSED = {
    "refused": (400, "the context holds 64"),
    "image": (400, "images are not supported"),
    "gone": (503, "stage 1 died"),
    "killed": (503, "Runner shutdown"),
    "closed": (503, "exo ended the answer"),
}


@pytest.fixture(scope="module", params=["exo_head", "exo_71"])
def answers(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What exo_api prints, with a prepared tiny Kimi in exo's models."""
    exo: ExoHere | str = request.getfixturevalue(request.param)
    if isinstance(exo, str) or (reason := exo.cannot_import_us()):
        pytest.skip(exo if isinstance(exo, str) else str(reason))
    home = tmp_path_factory.mktemp("home")
    prepare(tiny, home / "models", model_id="lab/kimi-k2-tiny")
    paths = [*exo.paths, exo.standin, exo.source / "src", REPOSITORY]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": ":".join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "EXO_HOME": ".exo",
        "EXO_DASHBOARD_DIR": str(home),
        "EXO_OFFLINE": "true",
        "EXO_MODELS_READ_ONLY_DIRS": str(home / "models"),
    }
    script = Path(__file__).with_name("exo_api.py")
    ran = subprocess.run([str(exo.python), str(script)], cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if value[0] != 405}  # v1.0.71 lacks one route


def of(answers: dict[str, Any], script: str) -> dict[str, list[Any]]:
    return {key: each for key, each in answers.items() if f" {script} " in key}


@pytest.mark.parametrize("script", REFUSED)
def test_every_refusal_on_every_route_is_words_and_a_status(answers: dict[str, Any], script: str) -> None:
    status, words = REFUSED[script]
    found = of(answers, script)
    assert len(found) >= 12
    for key, (got, kind, text) in found.items():
        assert (got, kind) == (status, "application/json") and words in text, key


def test_a_failure_in_mid_stream_is_words_and_without_streaming_a_status(answers: dict[str, Any]) -> None:
    for key, (status, _, text) in of(answers, "late").items():
        assert "stage 1 died" in text, key
        streamed = key.endswith("stream") and "Hel" in text  # v1.0.71 never streams a bench
        assert status == (200 if streamed else 503), key
    ends = {key.split()[0]: each[2] for key, each in of(answers, "late").items() if key.endswith("stream")}
    assert "message_stop" not in ends["/v1/messages"] and "event: error" in ends["/v1/messages"]
    assert "response.completed" not in ends["/v1/responses"] and "response.failed" in ends["/v1/responses"]


def test_a_call_whose_arguments_are_no_json_is_still_a_call_on_every_route(answers: dict[str, Any]) -> None:
    found = of(answers, "half a call")
    for key, (status, _, text) in found.items():
        assert status == 200, key
        assert "generate" in key or ("write" in text and "half" in text), key  # that route of Ollama's has no tools
    whole = json.loads(found["/v1/messages half a call whole"][2])
    assert whole["content"][-1]["input"] == {"raw_arguments": '{"text": "half'} and whole["stop_reason"] == "tool_use"


def test_answers_are_whole(answers: dict[str, Any]) -> None:
    for key, (status, _, text) in of(answers, "fine").items():
        assert status == 200 and ("Hello" in text or ("Hel" in text and "lo" in text)), key


def test_other_models_and_exos_own_refusals_are_exos(answers: dict[str, Any]) -> None:
    assert of(answers, "llama")["/v1/chat/completions llama whole"][:1] == [200]
    assert answers["unknown"][0] == 404


def test_a_prepared_model_is_listed_with_its_card_and_the_context_of_its_instance(answers: dict[str, Any]) -> None:
    card = json.loads(answers["listed"][2])
    assert (card["context_length"], card["capabilities"], card["family"]) == (4096, ["text"], "kimi")
    assert answers["shown"][0] == answers["added"][0] == 200
    info = json.loads(answers["shown"][2]).get("model_info")  # v1.0.71 has none
    assert info is None or info["kimi.context_length"] == 4096
