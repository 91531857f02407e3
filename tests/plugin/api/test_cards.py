"""Cards of Kimis in an exo of exo's shape: prepared ones are taken whole, and a placed model tells its instance's context."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from exo_kimi.plugin.api.cards import (
    placed_contexts,
    with_placed_context,
    with_prepared_card,
    with_prepared_cards,
    with_prepared_cards_71,
    with_shown_context,
)
from exo_kimi.plugin.control.prepare import prepare

MODEL, OTHER = "lab/kimi-k2-tiny", "lab/llama"


@dataclass(frozen=True)
class OldCard:
    """exo's ModelCard, without a key that a later one has."""

    model_fields: ClassVar[tuple[str, ...]] = ("model_id", "n_layers", "capabilities", "sampling_defaults")
    model_id: str
    n_layers: int
    capabilities: list[str]
    sampling_defaults: dict[str, Any]
    is_custom: bool = False

    @classmethod
    def model_validate(cls, raw: dict[str, Any]) -> OldCard:
        if not isinstance(raw.get("n_layers"), int):
            raise ValueError("n_layers: not a number")
        return cls(**raw)

    def model_copy(self, *, update: dict[str, Any]) -> OldCard:
        return replace(self, **update)


@pytest.fixture
def models(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models with a prepared one, in an exo that looks there."""
    folder = tmp_path / "models"
    prepare(tiny, folder, model_id=MODEL)
    constants, cards = ModuleType("exo.shared.constants"), ModuleType("exo.shared.models.model_cards")
    vars(constants).update(EXO_MODELS_DIRS=(tmp_path / "none",), EXO_MODELS_READ_ONLY_DIRS=(folder,))
    known: dict[str, Any] = {}
    vars(cards).update(ModelCard=OldCard, known=known, get_card=known.get)
    vars(cards).update(add_to_card_cache=lambda card: known.update({card.model_id: card}))
    for module in (constants, cards):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return folder


async def exos_own(model_id: str) -> str:
    return f"exo's card of {model_id}"


def test_a_model_that_a_user_adds_has_its_prepared_card(models: Path) -> None:
    fetch = with_prepared_card(exos_own)
    card = asyncio.run(fetch(MODEL))
    assert (card.n_layers, card.capabilities, card.is_custom) == (7, ["text"], True)
    assert set(card.sampling_defaults) == {"temperature", "top_p"}
    assert asyncio.run(fetch(OTHER)) == "exo's card of lab/llama"


def test_prepared_models_are_listed_before_anybody_adds_them(models: Path) -> None:
    cache = SimpleNamespace(cc={})

    async def refresh(self: Any) -> None:
        self.cc.setdefault(MODEL, "exo's own")  # exo keeps what is there
        self.cc.setdefault(OTHER, "exo's own")

    asyncio.run(with_prepared_cards(refresh)(cache))
    assert cache.cc[MODEL].n_layers == 7 and cache.cc[OTHER] == "exo's own"

    async def old_refresh() -> None:
        """As v1.0.71's."""

    asyncio.run(with_prepared_cards_71(old_refresh)())
    assert sys.modules["exo.shared.models.model_cards"].known[MODEL].n_layers == 7


def test_a_card_that_exo_does_not_take_is_told_and_passed_over(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = models / "lab--kimi-k2-tiny" / "exo_model_card.toml"
    for text in ("n_layers = 'many'", "n_layers ="):
        path.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert asyncio.run(with_prepared_card(exos_own)(MODEL)) == f"exo's card of {MODEL}"
        assert "exo_model_card.toml" in caplog.text
        caplog.clear()
    path.unlink()
    assert asyncio.run(with_prepared_card(exos_own)(MODEL)) == f"exo's card of {MODEL}" and not caplog.text


@dataclass
class Listed:
    """exo's ModelList, and each of its models."""

    id: str = ""
    context_length: int = 0
    data: list[Listed] = field(default_factory=list)

    def model_copy(self, *, update: dict[str, Any]) -> Listed:
        return replace(self, **update)


def placed(model_id: str, context: int) -> Any:
    shard = SimpleNamespace(model_card=SimpleNamespace(context_length=context))
    return SimpleNamespace(shard_assignments=SimpleNamespace(model_id=model_id, runner_to_shard={"r": shard}))


def test_a_placed_kimi_is_listed_with_the_context_of_its_instance() -> None:
    async def get_models(self: Any, status: str | None = None) -> Listed:
        return Listed(data=[Listed(id=MODEL, context_length=262_144), Listed(id=OTHER, context_length=8192)])

    api = SimpleNamespace(state=SimpleNamespace(instances={"i": placed(MODEL, 4096), "j": placed(OTHER, 1024)}))
    found = asyncio.run(with_placed_context(get_models)(api, status="downloaded"))
    assert {each.id: each.context_length for each in found.data} == {MODEL: 4096, OTHER: 8192}
    api.state.instances.clear()
    found = asyncio.run(with_placed_context(get_models)(api))
    assert found.data[0].context_length == 262_144


@dataclass
class Shown:
    """exo's OllamaShowResponse."""

    modelfile: str
    model_info: dict[str, Any] | None

    def model_copy(self, *, update: dict[str, Any]) -> Shown:
        return replace(self, **update)


@pytest.mark.parametrize(("model", "told"), [(MODEL, 4096), (OTHER, 262_144)])
def test_ollamas_clients_are_shown_the_context_of_a_placed_kimi(model: str, told: int) -> None:
    async def show(self: Any, request: Any) -> Shown:
        info = {"general.architecture": "kimi", "kimi.context_length": 262_144}
        return Shown(modelfile=f"FROM {model}", model_info=None if request == "v1.0.71" else info)

    api = SimpleNamespace(state=SimpleNamespace(instances={"i": placed(MODEL, 4096), "j": placed(OTHER, 1024)}))
    found = asyncio.run(with_shown_context(show)(api, "b5375f8ce")).model_info
    assert found == {"general.architecture": "kimi", "kimi.context_length": told}
    assert asyncio.run(with_shown_context(show)(api, "v1.0.71")).model_info is None


def test_of_several_instances_the_smallest_context_is_told() -> None:
    assert placed_contexts([placed(MODEL, 4096), placed(MODEL, 2048), placed(MODEL, 0)]) == {MODEL: 2048}
