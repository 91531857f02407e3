"""`--adapter [NAME=]PATH`: a request's `model` chooses whose weights answer, at every door; names that are taken are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointError, UsageError
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.requests import ServedAdapter
from exo_kimi.serve.adapters import find_adapters, served
from tests.runtime.adapters import write_random
from tests.train.lora.conftest import SHAPE

ADAPTERS = {"pirate": ServedAdapter(name="pirate", fingerprint="f" * 64)}
ASK = {"messages": [{"role": "user", "content": "Hi"}]}
DOORS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": ASK,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**ASK, "max_tokens": 100},
    "/api/chat": {**ASK, "stream": False},
    "/api/generate": {"prompt": "Hi", "stream": False},
}


@pytest.mark.parametrize("path", DOORS)
async def test_the_model_of_a_request_chooses_the_adapter_at_every_door(saying, client_of, path):
    engine = saying("Hello.")
    async with client_of(engine, adapters=ADAPTERS) as client:
        for name, adapter in (("pirate", ADAPTERS["pirate"]), ("tiny-kimi", None)):
            answer = await client.post(path, json={**DOORS[path], "model": name})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            assert engine.requests[-1].adapter == adapter
        answer = await client.post(path, json={**DOORS[path], "model": "parrot"})
        assert answer.status_code == 404 and "pirate" in answer.text


async def test_adapters_are_listed_with_the_model_that_they_are_of(saying, client_of):
    async with client_of(saying("Hello."), adapters=ADAPTERS) as client:
        cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert list(cards)[-1] == "pirate"
        assert cards["pirate"]["parent"] == next(iter(cards)) and "parent" not in cards[next(iter(cards))]
        assert (await client.get("/v1/models/pirate")).json()["id"] == "pirate"


async def test_ollama_s_tag_names_the_same_adapter(saying, client_of):
    engine = saying("Hello.")
    async with client_of(engine, adapters=ADAPTERS) as client:
        await client.post("/api/chat", json={**ASK, "stream": False, "model": "pirate:latest"})
        assert engine.requests[-1].adapter == ADAPTERS["pirate"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("served") / "base", layout="bf16", config=SHAPE, shards=1)


def test_names_come_from_the_option_or_the_folder_and_none_is_there_twice(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(base)
    path = write_random(tmp_path / "pirate", base, seed=1)
    found = find_adapters([str(path), f"parrot={path}"], checkpoint, taken=["base"])
    assert list(found) == ["pirate", "parrot"] and served(found)["parrot"].name == "parrot"
    for given in ([f"base={path}"], [str(path), str(path)]):
        with pytest.raises(UsageError, match="a name that is taken"):
            find_adapters(given, checkpoint, taken=["base"])
    for given in (f"a name={path}", "pirate=", f"={path}"):
        with pytest.raises(UsageError, match="no name that a request can ask for"):
            find_adapters([given], checkpoint, taken=[])
    with pytest.raises(CheckpointError, match="no such adapter directory"):
        find_adapters(["pirate=/nowhere"], checkpoint, taken=[])


def test_each_stage_is_told_of_every_adapter_and_counts_its_own_layers_part(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(base)
    adapters = find_adapters([str(write_random(tmp_path / "pirate", base, seed=1))], checkpoint, taken=[])
    plain = make_plan(checkpoint, stages=2)
    plan = make_plan(checkpoint, stages=2, adapters=adapters)
    added = [b.resident_bytes - a.resident_bytes for a, b in zip(plain.stages, plan.stages, strict=True)]
    ranges = [(stage.load.start_layer, stage.load.end_layer) for stage in plan.stages]
    assert added == [adapters["pirate"].bytes_within(*each) for each in ranges] and min(added) > 0
    assert sum(added) == sum(module.nbytes for module in adapters["pirate"].modules)
    assert all([each.name for each in stage.load.adapters] == ["pirate"] for stage in plan.stages)
