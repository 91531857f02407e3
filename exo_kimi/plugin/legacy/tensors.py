"""Token ids and hidden states between exo's numpy arrays and MLX, checked.

numpy has no bfloat16, so it travels as its bits; nothing is rounded on the way.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.errors import ProtocolError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.stage.stage_model import RAW, pack, unpack
from exo_kimi.runtime.steps import Hidden

Array = np.ndarray[Any, Any]


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
