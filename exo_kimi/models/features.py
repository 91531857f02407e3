"""Features: hidden states on their way through the layers, which a draft head reads beside the tokens.

Feature i is what enters layer i, with the residual added: 0 is what leaves the embedding, and the number of layers what leaves
the last of them. Of a stage, feature `start_layer` is what it is given, and feature `end_layer` is its neighbour's.

Source: `eagle_aux_hidden_state_layer_ids` of EAGLE-3 heads; "EAGLE-3: Scaling up inference acceleration of large language models
via training-time test", Li et al. 2025, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx


def check_order(layers: Iterable[int]) -> tuple[int, ...]:
    """Feature layers, ascending as they are reached, each once.

    Raises:
        ValueError: they are not.
    """
    found = tuple(layers)
    if list(found) != sorted(set(found)):
        raise ValueError(f"feature layers {found} are not in ascending order")
    return found


def features_before(layers: Iterable[int], layer: int) -> int:
    """How many of some feature layers lie before a layer, so that a stage that begins with it is given them."""
    return sum(each < layer for each in layers)


class FeatureTap:
    """Takes the features of one pass out of a model.

    Args:
        layers: whose features are wanted, ascending; those that the model does not own are never noted.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = check_order(layers)
        self._rows: dict[int, list[mx.array]] = {}

    def note(self, layer: int, hidden: mx.array) -> None:
        """What enters a layer: (N, D), or of a pass cut in pieces the next N rows of it."""
        if layer in self.layers:
            # Another object: the last layer writes its rows into the one that it is given.
            self._rows.setdefault(layer, []).append(mx.array(hidden))

    @property
    def rows(self) -> list[mx.array]:
        """What was noted and may not be evaluated yet."""
        return [part for parts in self._rows.values() for part in parts]

    def columns(self) -> list[mx.array]:
        """Of each feature that was noted, ascending, all rows: (N, D)."""
        noted = [self._rows[layer] for layer in self.layers if layer in self._rows]
        return [parts[0] if len(parts) == 1 else mx.concatenate(parts) for parts in noted]
