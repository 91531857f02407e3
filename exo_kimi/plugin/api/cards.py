"""Cards of Kimis in exo's API: full ones of prepared directories, and the context that a placed instance has.

exo makes a card of config.json alone for a model that it does not know: no thinking toggle, no sampling defaults. `exo prepare`
leaves a full card in the directory, which these read in place of that.
"""

from __future__ import annotations

import functools
import importlib
import logging
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from exo_kimi.plugin.control.model_card import CARD_FILE
from exo_kimi.plugin.control.model_names import directory_name, names_a_kimi

logger = logging.getLogger(__name__)
_CARDS = "exo.shared.models.model_cards"


def read_prepared_card(directory: Path) -> Any | None:
    """exo's ModelCard of a prepared directory; None where there is none that this exo takes."""
    card_type: Any = importlib.import_module(_CARDS).ModelCard
    try:
        raw = tomllib.loads((directory / CARD_FILE).read_text(encoding="utf-8"))
        return card_type.model_validate({key: value for key, value in raw.items() if key in card_type.model_fields})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a ValidationError of pydantic is one
        logger.warning("exo cannot use %s: %s", directory / CARD_FILE, " ".join(str(error).split()))
        return None


def prepared_cards() -> Iterator[Any]:
    """Those of all prepared directories of this node."""
    for folder in _model_folders():
        for path in sorted(folder.glob(f"*/{CARD_FILE}")):
            if (card := read_prepared_card(path.parent)) is not None:
                yield card


def with_prepared_card(fetch: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """exo's `ModelCard.fetch_from_hf`, which takes the card of a prepared directory where there is one."""

    @functools.wraps(fetch)
    async def fetch_from_hf(model_id: Any) -> Any:
        for folder in _model_folders():
            card = read_prepared_card(folder / directory_name(str(model_id)))
            if card is not None and card.model_id == model_id:
                return card.model_copy(update={"is_custom": True})  # as all that a user adds
        return await fetch(model_id)

    return fetch_from_hf


def with_prepared_cards(refresh: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """exo's `_CardCache.refresh`, after the cards of prepared directories."""

    @functools.wraps(refresh)
    async def refresh_with_prepared(self: Any) -> None:
        for card in prepared_cards():
            self.cc.setdefault(card.model_id, card)
        await refresh(self)

    return refresh_with_prepared


def with_prepared_cards_71(refresh: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """v1.0.71's `_refresh_card_cache`, after the cards of prepared directories."""

    @functools.wraps(refresh)
    async def refresh_with_prepared() -> None:
        cards: Any = importlib.import_module(_CARDS)
        for card in prepared_cards():
            if cards.get_card(card.model_id) is None:
                cards.add_to_card_cache(card)
        await refresh()

    return refresh_with_prepared


def with_placed_context(get_models: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """exo's `API.get_models`, where a placed Kimi has the context of its instance."""

    @functools.wraps(get_models)
    async def get_models_as_placed(self: Any, *args: Any, **kwargs: Any) -> Any:
        listed = await get_models(self, *args, **kwargs)
        contexts = placed_contexts(self.state.instances.values())
        models = [
            each.model_copy(update={"context_length": contexts[each.id]}) if each.id in contexts else each
            for each in listed.data
        ]
        return listed.model_copy(update={"data": models})

    return get_models_as_placed


def with_shown_context(show: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """exo's `API.ollama_show`, where a placed Kimi has the context of its instance; v1.0.71 tells none."""

    @functools.wraps(show)
    async def ollama_show_as_placed(self: Any, request: Any) -> Any:
        shown = await show(self, request)
        contexts = placed_contexts(self.state.instances.values())
        context = contexts.get(str(shown.modelfile).removeprefix("FROM "))
        info = getattr(shown, "model_info", None)
        if context is None or not info:
            return shown
        told = {key: context if key.endswith(".context_length") else value for key, value in info.items()}
        return shown.model_copy(update={"model_info": told})

    return ollama_show_as_placed


def placed_contexts(instances: Iterable[Any]) -> dict[str, int]:
    """Model id -> tokens of one sequence, of every placed Kimi that says so; of several, the smallest."""
    found: dict[str, int] = {}
    for instance in instances:
        assigned = instance.shard_assignments
        cards = [shard.model_card for shard in assigned.runner_to_shard.values()]
        if names_a_kimi(str(assigned.model_id)) and cards and cards[0].context_length:
            context = int(cards[0].context_length)
            found[assigned.model_id] = min(found.get(assigned.model_id, context), context)
    return found


def _model_folders() -> tuple[Path, ...]:
    """Where exo looks for models."""
    constants: Any = importlib.import_module("exo.shared.constants")
    return (*constants.EXO_MODELS_READ_ONLY_DIRS, *constants.EXO_MODELS_DIRS)
