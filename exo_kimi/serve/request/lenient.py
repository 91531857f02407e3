"""Fields of agents' requests: one that this server does not know is taken and named, for their clients gain new ones monthly."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from exo_kimi.dialogue.reasoning import EFFORT_BUDGETS
from exo_kimi.serve.problems import from_validation

MAX_NAMED = 12  # fields named in one warning


class LenientFields(BaseModel):
    """A part of a request: no coercion of types, null means absent, other keys are kept to be named."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


Schema = TypeVar("Schema", bound=LenientFields)


def read_fields(schema: type[Schema], body: dict[str, Any]) -> Schema:
    """The body as its model.

    Raises:
        RequestError: a field is missing, or has the wrong type or value.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise from_validation(error, body) from None


def unknown_fields(part: LenientFields, path: str = "") -> Iterator[str]:
    """The names of all fields that no model knows and that are not null, `reasoning.context` for nested ones."""
    for name, value in (part.model_extra or {}).items():
        if value is not None:
            yield f"{path}{name}"[:80]
    for name in type(part).model_fields:
        if isinstance(value := getattr(part, name), LenientFields):
            yield from unknown_fields(value, f"{path}{name}.")


def known_effort(effort: str | None, warnings: list[str]) -> str | None:
    """An effort as the dialogue knows it; none is asked for in another field.

    Args:
        effort: as the client wrote it.
        warnings: gets a sentence for one that nobody knows.
    """
    if effort is None or effort == "none":
        return None
    if effort.lower() in EFFORT_BUDGETS:
        return effort.lower()
    warnings.append(f"effort '{effort[:40]}' was left out: this server does not know it")
    return None


def name_unknown(part: LenientFields, *, silent: Collection[str] = ()) -> list[str]:
    """One warning for all unknown fields but the `silent` ones, or none."""
    found = [name for name in unknown_fields(part) if name not in silent]
    if not found:
        return []
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return [f"unknown fields were left out: {', '.join(found[:MAX_NAMED])}{more}"]
