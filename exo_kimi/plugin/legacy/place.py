"""What travels beside every tensor of a Kimi: where in the sequence and the model it belongs, and by which plan.

Legacy exo sends hidden states with a request's id only. So a node that lost a sequence would begin it anew, one that a node
was skipped before would take the wrong layers' output, and both would answer wrong text. It goes through exo's own
`inference_state`, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.errors import ProtocolError

KEY, IDS = "exo_kimi", "exo_kimi_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Of one tensor.

    Args:
        plan: digest of the sender's plan.
        offset: tokens of the sequence before this tensor.
        layer: the layer that comes next; 0 for token ids.
        more: further pieces of the prompt follow, so nothing is sampled yet.
    """

    plan: str
    offset: int
    layer: int
    more: bool = False

    def to_state(self) -> dict[str, Any]:
        """As exo's `inference_state`."""
        return {KEY: {"plan": self.plan, "offset": self.offset, "layer": self.layer, "more": self.more}}


def place_of(state: Mapping[str, Any] | None) -> Place:
    """From exo's `inference_state`.

    Raises:
        ProtocolError: the sender said nothing, or something else.
    """
    told = (state or {}).get(KEY)
    kinds = {"plan": str, "offset": int, "layer": int, "more": bool}
    if not isinstance(told, Mapping) or {key: type(value) for key, value in told.items()} != kinds:
        raise ProtocolError(
            "a tensor of a Kimi that no exo-kimi sent",
            expected="every node started by `exo-kimi exo-legacy`, of one version",
            found=repr(told)[:80],
        )
    return Place(plan=told["plan"], offset=told["offset"], layer=told["layer"], more=told["more"])


def ids_of(state: Mapping[str, Any] | None) -> list[int] | None:
    """The prompt's token ids, if the node that rendered it sent them.

    Raises:
        ProtocolError: they are no token ids.
    """
    ids = (state or {}).get(IDS)
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or any(type(each) is not int for each in ids):
        raise ProtocolError("a prompt that is no list of token ids", found=repr(ids)[:80])
    return list(ids)
