"""What a stage needs of a model, so that tests can give it others; it knows nothing of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx


class StageConfig(Protocol):
    """What a stage needs of `arch.config.KimiConfig`."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class StageModel(Protocol):
    """What a stage needs of `models.kimi_k2.Model`."""

    @property
    def args(self) -> StageConfig: ...

    @property
    def is_first(self) -> bool: ...

    @property
    def is_last(self) -> bool: ...

    @property
    def start_layer(self) -> int: ...

    @property
    def end_layer(self) -> int: ...

    def make_cache(self) -> list[Any]: ...

    def forward_ragged(
        self, x: mx.array, segments: Sequence[tuple[int, list[Any]]], *, asked: Sequence[int] | None = None
    ) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...

    def cache_nbytes(self, caches: list[Any]) -> int: ...
