"""The model as a stage sees it, and the hidden states that pass between stages as raw bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from exo_kimi.errors import ProtocolError
from exo_kimi.models.expert_bank import StreamedExperts
from exo_kimi.models.features import FeatureTap, features_before
from exo_kimi.runtime.requests import ExpertHealth
from exo_kimi.runtime.steps import Hidden, HiddenDtype

NAMES: dict[mx.Dtype, HiddenDtype] = {
    mx.float32: "float32",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
}
DTYPES: dict[HiddenDtype, mx.Dtype] = {name: dtype for dtype, name in NAMES.items()}
RAW: dict[HiddenDtype, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


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

    def embed(self, tokens: mx.array) -> mx.array: ...

    def forward_ragged(
        self,
        x: mx.array,
        segments: Sequence[tuple[int, list[Any]]],
        *,
        asked: Sequence[int] | None = None,
        tap: FeatureTap | None = None,
    ) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...

    def cache_nbytes(self, caches: list[Any]) -> int: ...


def width_of(model: StageModel, feature_layers: Sequence[int]) -> int:
    """Elements of a row that a stage is given: a hidden state, and the features of layers before it."""
    return model.args.hidden_size * (1 + features_before(feature_layers, model.start_layer))


def forward_tapped(
    model: StageModel,
    x: mx.array,
    segments: Sequence[tuple[int, list[Any]]],
    *,
    feature_layers: Sequence[int],
    asked: Sequence[int] | None = None,
) -> tuple[mx.array, mx.array | None]:
    """One pass of a stage, with the features that a draft head reads.

    Args:
        model: the stage's layers.
        x: token ids, or rows as `width_of` says.
        segments, asked: see `Model.forward_ragged`.
        feature_layers: ascending; empty for no features.

    Returns:
        Hidden states (N, D), and the features of all layers so far side by side (N, n D), None for none.
    """
    if not feature_layers:
        return model.forward_ragged(x, segments, asked=asked), None
    size, given = model.args.hidden_size, features_before(feature_layers, model.start_layer)
    tap = FeatureTap(each for each in feature_layers if each >= model.start_layer)
    columns = [x[:, size:]] if given and x.ndim == 2 else []
    x = x[:, :size] if columns else x
    asked = None if model.is_last and model.end_layer in feature_layers else asked
    hidden = model.forward_ragged(x, segments, asked=asked, tap=tap)
    columns += tap.columns()
    if not columns:
        return hidden, None
    return hidden, columns[0] if len(columns) == 1 else mx.concatenate(columns, axis=1)


class AdaptedModels:
    """A stage's layers without an adapter and with each of those that it holds; all but the adapters' own arrays is shared.

    Args:
        base: without one.
        adapted: by name.
    """

    def __init__(self, base: StageModel, adapted: Mapping[str, StageModel] | None = None) -> None:
        self._models: dict[str | None, StageModel] = {None: base}
        self._models.update(adapted or {})

    def __contains__(self, name: str | None) -> bool:
        return name in self._models

    def forward(
        self,
        x: mx.array,
        segments: Sequence[tuple[int, list[Any]]],
        adapters: Sequence[str | None],
        *,
        feature_layers: Sequence[int],
        asked: Sequence[int] | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """One pass as `forward_tapped`, each segment through its adapter. Where they differ, segments of one adapter go together,
        those of one after those of another: a step without adapters is what it was, and one with `n` reads shared weights `n`
        times, and experts no more often than their tokens ask for.

        Args:
            adapters: of each segment, a name that this object has or None.
        """
        groups = list(dict.fromkeys(adapters))
        if len(groups) == 1:
            model = self._models[groups[0]]
            return forward_tapped(model, x, segments, feature_layers=feature_layers, asked=asked)
        ends = np.cumsum([length for length, _ in segments])
        hidden, features, order = list[mx.array](), list[mx.array](), list[np.ndarray[Any, Any]]()
        for group in groups:
            chosen = [index for index, name in enumerate(adapters) if name == group]
            rows = np.concatenate([np.arange(ends[index] - segments[index][0], ends[index]) for index in chosen])
            out, noted = forward_tapped(
                self._models[group],
                x[mx.array(rows.astype(np.int32))],
                [segments[index] for index in chosen],
                feature_layers=feature_layers,
                asked=None if asked is None else [asked[index] for index in chosen],
            )
            if len(rows) > len(chosen):
                mx.eval(out, [] if noted is None else noted)  # or both groups' scratch would be held
            hidden.append(out)
            features += [] if noted is None else [noted]
            order.append(rows)
        back = mx.array(np.argsort(np.concatenate(order)).astype(np.int32))
        return mx.concatenate(hidden)[back], mx.concatenate(features)[back] if features else None


def pack(array: mx.array) -> Hidden:
    """Hidden states [tokens, hidden_size] as bytes that share the array's memory; evaluates the array.

    Raises:
        ProtocolError: a dtype that no stage sends.
    """
    if array.dtype not in NAMES:
        raise ProtocolError("hidden states of a dtype that stages do not exchange", found=array.dtype)
    name = NAMES[array.dtype]
    tokens, hidden_size = array.shape
    # numpy and the buffer protocol have no bfloat16: it travels as its bits.
    raw = mx.contiguous(array.view(mx.uint16) if name == "bfloat16" else array)
    mx.eval(raw)
    view = memoryview(raw)  # type: ignore[arg-type]  # it has the buffer protocol, its stubs do not say so
    return Hidden(dtype=name, tokens=tokens, hidden_size=hidden_size, data=view.cast("B"))


def unpack(hidden: Hidden, *, tokens: int, hidden_size: int) -> mx.array:
    """Bytes as hidden states [tokens, hidden_size].

    Raises:
        ProtocolError: the size is not what this step and this model need.
    """
    expected = tokens * hidden_size * (4 if hidden.dtype == "float32" else 2)
    found = memoryview(hidden.data).nbytes
    if (hidden.tokens, hidden.hidden_size) != (tokens, hidden_size) or found != expected:
        raise ProtocolError(
            "hidden states of the wrong size",
            expected=f"[{tokens}, {hidden_size}], {expected} bytes of {hidden.dtype}",
            found=f"[{hidden.tokens}, {hidden.hidden_size}], {found} bytes",
        )
    raw = np.frombuffer(hidden.data, RAW[hidden.dtype]).reshape(tokens, hidden_size)
    array = mx.array(raw)
    return array.view(mx.bfloat16) if hidden.dtype == "bfloat16" else array


def expert_health(streamed: StreamedExperts) -> ExpertHealth:
    """How a stage's experts fare that stay on disk."""
    counters, reads = streamed.counters, streamed.store.counters
    return ExpertHealth(
        slots=streamed.slots,
        slot_bytes=streamed.slot_bytes,
        hits=counters.hits,
        misses=counters.misses,
        evictions=counters.evictions,
        read_bytes=reads.read_bytes,
        read_s=reads.read_s,
        stall_s=reads.stall_s,
        failed_reads=reads.failed,
        prefetched_bytes=reads.prefetched_bytes,
        prefetch_used_bytes=reads.prefetch_used_bytes,
        prefetch_wasted_bytes=reads.prefetch_wasted_bytes,
        prefetch_experts=0 if streamed.prefetcher is None else streamed.prefetcher.policy.count,
    )
