"""What travels between nodes of a Kimi: token ids and hidden states as exo's numpy arrays, and each one's position beside it.

numpy has no bfloat16, so it travels as its bits; nothing is rounded on the way. Legacy exo sends hidden states with a request's
id only. So a node that lost a sequence would begin it anew, one that a node was skipped before would take the wrong layers'
output, and both would answer wrong text. A position goes through exo's own `inference_state`, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.errors import ProtocolError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.stage.stage_model import RAW, pack, unpack
from exo_kimi.runtime.steps import Hidden

Array = np.ndarray[Any, Any]
KEY, IDS = "exo_kimi", "exo_kimi_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPosition:
    """Where in the sequence and in the model a tensor belongs, and by which plan.

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


def position_of(state: Mapping[str, Any] | None) -> TensorPosition:
    """Read a position from exo's `inference_state`.

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
    return TensorPosition(plan=told["plan"], offset=told["offset"], layer=told["layer"], more=told["more"])


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


def taken(model: Model, tensor: Array) -> mx.array:
    """What exo brings, checked.

    Args:
        model: this stage's.
        tensor: (1, L) token ids for the first stage, else (1, L, D) as `given` made it.

    Returns:
        (L,) int32 token ids or (L, D) hidden states as they left the stage before.

    Raises:
        ProtocolError: something else.
    """
    hidden_size, vocab_size = model.args.hidden_size, model.args.vocab_size
    if model.is_first:
        good = tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.size and np.issubdtype(tensor.dtype, np.integer)
        if not (good and 0 <= int(tensor.min()) <= int(tensor.max()) < vocab_size):
            raise ProtocolError(
                "no token ids",
                expected=f"(1, L) integers below {vocab_size}",
                found=f"{tensor.shape} {tensor.dtype}",
            )
        return mx.array(tensor.reshape(-1).astype(np.int32))
    name = next((name for name, raw in RAW.items() if tensor.dtype == raw), None)
    if name is None or tensor.ndim != 3 or tensor.shape[0] != 1 or not tensor.shape[1]:
        raise ProtocolError(
            "no hidden states", expected=f"(1, L, {hidden_size})", found=f"{tensor.shape} {tensor.dtype}"
        )
    _, tokens, found_size = tensor.shape
    hidden = Hidden(dtype=name, tokens=tokens, hidden_size=found_size, data=tensor.tobytes())
    return unpack(hidden, tokens=tokens, hidden_size=hidden_size)


def given(hidden: mx.array) -> Array:
    """(L, D) hidden states as (1, L, D) of float32, float16, or bfloat16's bits as uint16; evaluates them."""
    packed = pack(hidden)
    return np.frombuffer(packed.data, RAW[packed.dtype]).reshape(1, packed.tokens, packed.hidden_size)
