"""Responses kept in memory, for `GET`, `DELETE`, `previous_response_id` and references to items: the latest, up to a size."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_RESPONSES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One response and the conversation that led to it.

    Args:
        response: the object as it was answered.
        input_items: of the request alone, each with an id.
        messages: the whole conversation, the reply among them, without instructions.
    """

    response: Mapping[str, Any]
    input_items: Sequence[Mapping[str, Any]]
    messages: Sequence[Mapping[str, Any]]


class ResponseStore:
    """The latest responses; the least recently used ones make room. Used from the event loop only.

    Args:
        max_bytes: of all of them, as JSON.
        max_responses: how many.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_responses: int = MAX_RESPONSES) -> None:
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._items: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, stored: StoredResponse) -> None:
        """Keep one, unless it alone is larger than all may be."""
        size = _size(stored)
        if size > self._max_bytes:
            return
        response_id = str(stored.response["id"])
        self._kept[response_id] = (stored, size)
        self.bytes += size
        for item in (*stored.input_items, *stored.response["output"]):
            self._items[str(item["id"])] = (response_id, item)
        while self.bytes > self._max_bytes or len(self._kept) > self._max_responses:
            self.delete(next(iter(self._kept)))

    def get(self, response_id: str) -> StoredResponse | None:
        """One that is kept, which makes it the most recently used."""
        found = self._kept.get(response_id)
        if found is None:
            return None
        self._kept.move_to_end(response_id)
        return found[0]

    def find_item(self, item_id: str) -> Mapping[str, Any] | None:
        """An item of a response that is kept."""
        found = self._items.get(item_id)
        return None if found is None else found[1]

    def delete(self, response_id: str) -> bool:
        """Forget one; False: there was none."""
        found = self._kept.pop(response_id, None)
        if found is None:
            return False
        stored, size = found
        self.bytes -= size
        for item in (*stored.input_items, *stored.response["output"]):
            if self._items.get(str(item["id"]), ("",))[0] == response_id:
                del self._items[str(item["id"])]
        return True


def _size(stored: StoredResponse) -> int:
    parts = (stored.response, *stored.input_items, *stored.messages)
    return sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in parts)
