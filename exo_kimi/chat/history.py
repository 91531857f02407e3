"""The calls of a conversation so far, under the ids that Kimi was trained on: `functions.NAME:IDX`, counted from 0.

Kimi's templates write a past call's id as the header of that call. With a client's own ids (`call_1`, `toolu_...`) the prompt
would hold calls without a function name, and the model begins to write such headers itself. So the prompt gets ids of ours,
whatever the client uses; the client's ids are only for the client, and none of them is handed out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.chat.call_names import PREFIX

# A result whose call is no longer in the conversation (a client that trims its history) still needs a name.
_LOST_CALL = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHistory:
    """A conversation as the prompt shows it.

    Args:
        messages: those of the client, with Kimi's ids in calls and results.
        used_ids: ids that a new call must not have: the client's, and those in the prompt.
        next_index: number of the next call.
    """

    messages: tuple[Mapping[str, Any], ...]
    used_ids: frozenset[str] = frozenset()
    next_index: int = 0

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> CallHistory:
        """Number the calls of a conversation in order, and match each result to its call.

        A result belongs to the latest call with its id; without such a call, to the first call before it that has no result.
        """
        renamed: list[Mapping[str, Any]] = []
        used: set[str] = set()
        open_calls: list[tuple[str, str]] = []  # (the client's id, ours) of calls without a result yet
        known: dict[str, str] = {}
        count = 0
        for message in messages:
            calls = message.get("tool_calls")
            if message.get("role") == "assistant" and isinstance(calls, list | tuple) and calls:
                open_calls, named = [], []
                for call in calls:
                    theirs, ours = _id_of(call), f"{PREFIX}{_name_of(call)}:{count}"
                    count += 1
                    open_calls.append((theirs, ours))
                    known[theirs] = ours
                    used |= {theirs, ours}
                    named.append({**call, "id": ours} if isinstance(call, Mapping) else call)
                message = {**message, "tool_calls": named}
            elif message.get("role") == "tool":
                theirs = str(message.get("tool_call_id") or "")
                match = next((each for each in open_calls if each[0] == theirs), None)
                if match is None and theirs not in known and open_calls:
                    match = open_calls[0]
                if match is not None:
                    open_calls.remove(match)
                    ours = match[1]
                elif theirs in known:
                    ours = known[theirs]
                else:
                    ours = f"{PREFIX}{message.get('name') or _LOST_CALL}:{count}"
                    count += 1
                used |= {theirs, ours}
                message = {**message, "tool_call_id": ours}
            renamed.append(message)
        return cls(messages=tuple(renamed), used_ids=frozenset(used - {""}), next_index=count)


def _id_of(call: object) -> str:
    return str(call.get("id") or "") if isinstance(call, Mapping) else ""


def _name_of(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return str(name or _LOST_CALL)


NO_CALLS = CallHistory(messages=())
