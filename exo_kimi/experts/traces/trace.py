"""A trace: the experts that the tokens of a workload were routed to, layer by layer, and its file.

The file is a NumPy archive (`.npz`) of whole numbers, under 1 KB a token for K2. It holds no text and no weights, but who has the
model can guess topics from it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError
from exo_kimi.experts.asked import asked
from exo_kimi.experts.budget import LayerProfile
from exo_kimi.experts.traces.growing import MAGIC, read_growing
from exo_kimi.units import format_bytes

VERSION = 1
ARRAYS = ("version", "experts", "layers", "ids", "calls", "source")
LARGEST_BYTES = 4 << 30  # of a file unpacked: 4 million tokens of K2
# What zipfile and NumPy raise for a damaged archive.
_DAMAGED = (ValueError, EOFError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError)
_UNREADABLE: tuple[type[Exception], ...] = (OSError, *_DAMAGED, zlib.error, struct.error, zipfile.BadZipFile)
Ids = NDArray[np.unsignedinteger[Any]]
Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTrace:
    """Experts of tokens, in the order of the forward passes that routed them.

    Args:
        ids: (M, T, K) whole numbers below `experts`, K different ones a token: M layers with experts, T tokens.
        experts: of a layer, E.
        layers: which layer each of the M is.
        calls: tokens of each forward pass, in order, T in all: 1 for a decoded token of one sequence, more for a batch or a chunk
            of a prompt. An expert is asked for once a pass, however many tokens share it.
        source: what was traced, for people.
    """

    ids: Ids
    experts: int
    layers: tuple[int, ...]
    calls: Int32s
    source: str = ""

    def __post_init__(self) -> None:
        _check(self, where="trace")

    @classmethod
    def of_tokens(cls, ids: Any, *, experts: int, layers: Sequence[int] | None = None, source: str = "") -> ExpertTrace:
        """A trace whose tokens came one at a time, as in decoding one sequence.

        Args:
            ids: (M, T, K).
            experts: E.
            layers: of the M; 0, 1, ... when not given.
            source: what was traced.
        """
        array = np.asarray(ids)
        return cls(
            ids=array.astype(_dtype(experts)),
            experts=experts,
            layers=tuple(range(array.shape[0])) if layers is None else tuple(layers),
            calls=np.ones(array.shape[1], np.int32),
            source=source,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    @property
    def chosen(self) -> int:
        """Experts of a token, K."""
        return int(self.ids.shape[2])

    @property
    def passes(self) -> Iterator[slice]:
        """The tokens of each forward pass."""
        start = 0
        for tokens in self.calls.tolist():
            yield slice(start, start + tokens)
            start += tokens

    def requests(self, layer: int) -> list[tuple[int, ...]]:
        """What each forward pass asks of a layer: its different experts, in the order in which the engine names them.

        Args:
            layer: which of the M, from 0.
        """
        return [tuple(asked(self.ids[layer, span].ravel())) for span in self.passes]

    def decoding(self) -> ExpertTrace:
        """The same tokens one at a time: what one sequence would ask for if it decoded them all."""
        return ExpertTrace(
            ids=self.ids,
            experts=self.experts,
            layers=self.layers,
            calls=np.ones(self.tokens, np.int32),
            source=self.source,
        )

    def overlap(self) -> float:
        """Share of a token's experts that the token before had too, over all layers: chance is K / E."""
        before, after = self.ids[:, :-1, :, None], self.ids[:, 1:, None, :]
        return float((before == after).any(axis=2).mean()) if self.tokens > 1 else 0.0

    def popularity(self) -> NDArray[np.float64]:
        """(M, E): in which share of the tokens each expert is chosen."""
        counts = [np.bincount(layer.ravel(), minlength=self.experts) for layer in self.ids]
        return np.stack(counts) / max(1, self.tokens)

    def profile(self) -> tuple[LayerProfile, ...]:
        """The experts of each layer that were chosen at all, the one that was chosen most first."""
        ranked = [np.argsort(-shares, kind="stable")[: int((shares > 0).sum())] for shares in self.popularity()]
        return tuple(
            LayerProfile(layer=layer, experts=tuple(experts.tolist()))
            for layer, experts in zip(self.layers, ranked, strict=True)
        )

    def save(self, path: str | Path) -> None:
        """Write the file; the same trace gives the same bytes."""
        with Path(path).open("wb") as file:
            np.savez_compressed(
                file,
                version=np.int64(VERSION),
                experts=np.int64(self.experts),
                layers=np.array(self.layers, np.int32),
                ids=self.ids.astype(_dtype(self.experts)),
                calls=self.calls,
                source=np.frombuffer(self.source.encode(), np.uint8),
            )


def read_trace(path: str | Path) -> ExpertTrace:
    """A trace from its file.

    Raises:
        UsageError: it cannot be read, or is no trace, or of another version.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return _read_growing(Path(path))
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(entry.file_size for entry in archive.infolist())
        if size_bytes > LARGEST_BYTES:
            found = format_bytes(size_bytes)
            raise UsageError(
                "a trace too large to replay", expected=format_bytes(LARGEST_BYTES), found=found, where=path
            )
        with np.load(path, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in arrays.files}
    except _UNREADABLE as error:
        fix = "record one: `exo-kimi trace record DIR -o trace.npz`"
        raise UsageError(
            "cannot read the trace", found=(str(error) or type(error).__name__).splitlines()[0], where=path, fix=fix
        ) from None
    if "version" in parts and parts["version"].shape == () and parts["version"] != VERSION:
        version = int(parts["version"])
        raise UsageError(
            "a trace of another version", expected=VERSION, found=version, where=path, fix="record it again"
        )
    whole = all(np.issubdtype(part.dtype, np.integer) for part in parts.values())
    if set(parts) != set(ARRAYS) or not whole or parts["experts"].shape != ():
        found = ", ".join(sorted(parts)) or "nothing"
        raise UsageError(
            "a file that is no trace", expected=f"whole numbers of {', '.join(ARRAYS)}", found=found, where=path
        )
    values = {
        "ids": parts["ids"],
        "experts": int(parts["experts"]),
        "layers": tuple(parts["layers"].ravel().tolist()),
        "calls": parts["calls"].astype(np.int32),
        "source": parts["source"].astype(np.uint8).tobytes().decode(errors="replace"),
    }
    return _trace_of(values, where=path)


def read_traces(paths: Sequence[str | Path]) -> ExpertTrace:
    """One trace of the files of several stages, each of which recorded its own layers.

    Raises:
        UsageError: see `read_trace`; or they are not of the same passes, or of the same layers.
    """
    traces = [read_trace(path) for path in paths]
    first = traces[0]
    for path, each in zip(paths[1:], traces[1:], strict=True):
        if each.experts != first.experts or not np.array_equal(each.calls, first.calls):
            raise UsageError(
                "traces of different passes cannot be one",
                expected=f"{first.tokens} tokens in {len(first.calls)} passes, as of {paths[0]}",
                found=f"{each.tokens} in {len(each.calls)}",
                where=path,
                fix="give the files of all stages of one server, copied after it stopped",
            )
    if len(traces) == 1:
        return first
    values = {
        "ids": np.concatenate([each.ids for each in traces]),
        "experts": first.experts,
        "layers": tuple(layer for each in traces for layer in each.layers),
        "calls": first.calls,
        "source": f"{len(traces)} stages: {first.source}",
    }
    return _trace_of(values, where=paths[0])


def _read_growing(path: Path) -> ExpertTrace:
    if path.stat().st_size > LARGEST_BYTES:
        found = format_bytes(path.stat().st_size)
        raise UsageError("a trace too large to replay", expected=format_bytes(LARGEST_BYTES), found=found, where=path)
    return _trace_of(read_growing(path), where=path)


def _trace_of(values: Mapping[str, Any], *, where: object) -> ExpertTrace:
    """With what is wrong told of the file that it came from."""
    trace = object.__new__(ExpertTrace)
    for name, value in values.items():
        object.__setattr__(trace, name, value)
    _check(trace, where=where)
    return trace


def _check(trace: ExpertTrace, *, where: object) -> None:
    ids, calls = trace.ids, trace.calls
    if ids.ndim != 3 or not all(ids.shape):
        raise UsageError(
            "a trace without tokens", expected="(layers, tokens, experts a token)", found=ids.shape, where=where
        )
    layers, tokens, chosen = ids.shape
    if not chosen <= trace.experts <= 1 << 16 or int(ids.max()) >= trace.experts or int(ids.min()) < 0:
        expected = f"{chosen} of 0 to {trace.experts - 1}"
        raise UsageError(
            "a trace of experts that are not there", expected=expected, found=f"{ids.min()} to {ids.max()}", where=where
        )
    if (np.diff(np.sort(ids, axis=2).astype(np.int32), axis=2) == 0).any():
        raise UsageError(
            "a trace in which a token chooses an expert twice", expected=f"{chosen} different ones", where=where
        )
    if len(trace.layers) != layers or len(set(trace.layers)) != layers:
        raise UsageError("a trace with wrong layers", expected=f"{layers} different", found=trace.layers, where=where)
    if calls.ndim != 1 or (calls < 1).any() or int(calls.sum()) != tokens:
        raise UsageError("a trace with wrong passes", expected=f"{tokens} tokens", found=int(calls.sum()), where=where)


def _dtype(experts: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if experts <= 1 << 8 else np.uint16
