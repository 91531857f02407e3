"""INT4 as K2-Thinking was trained: routed experts in groups of 32, symmetric; it knows nothing of models or files."""

from __future__ import annotations

from exo_kimi.checkpoint.packing import INT4_GROUP, Floats, int4_codes, restore


def fake_quant(weight: Floats) -> Floats:
    """The values that the exported codes stand for; gradients pass straight through to the weight."""
    codes, scales = int4_codes(weight, dtype="BF16", symmetric=True)
    groups = codes.reshape(*weight.shape[:-1], -1, INT4_GROUP).astype("float32")
    groups *= restore(scales)[..., None]
    return groups.reshape(weight.shape)
