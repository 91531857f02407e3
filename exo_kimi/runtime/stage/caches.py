"""Caches of a sequence as arrays that can be cut, copied and put together again.

A cache's `keys` and `values` are arrays (1, heads, capacity, width), of one head for latents, or tuples of such (a quantized
cache: data, scales, biases).
Recurrent states are not cut: a sequence begins as all of another or at a snapshot, and gives back tokens of its newest pass
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from exo_kimi.errors import StageError
from exo_kimi.models.kda.recurrent_cache import RecurrentCache

Leaves = dict[str, mx.array]
"""One array for each part of a cache, such as `keys` or `keys.0`."""

Snapshot = tuple[tuple[mx.array | None, mx.array | None], ...]
"""What the layers with states hold after the same tokens, in order."""
_STATES = ("conv_state", "recurrent_state")


def capacity_for(tokens: int, caches: Sequence[Any]) -> int:
    """Tokens that a cache takes memory for when it is to hold `tokens`."""
    step = next((int(cache.step) for cache in _growing(caches)), 1)
    return -(-tokens // step) * step


def room(caches: Sequence[Any]) -> int:
    """Tokens that the caches of a sequence can take without more memory."""
    growing = next(_growing(caches), None)
    if growing is None:
        return sys.maxsize
    held = min((leaf.shape[2] for _, leaf in _leaves(growing)), default=0)
    return held - int(growing.offset)


def least_length(caches: Sequence[Any]) -> int:
    """The fewest tokens down to which `trim` can go back: 0, but for states."""
    return max((cache.least_offset for cache in caches if isinstance(cache, RecurrentCache)), default=0)


def has_states(caches: Sequence[Any]) -> bool:
    """Whether some of them are states, which are not cut."""
    return any(isinstance(cache, RecurrentCache) for cache in caches)


def take_snapshot(caches: Sequence[Any]) -> Snapshot:
    """The states of now, by reference, evaluated: later tokens replace arrays and write into none."""
    snapshot = tuple(cache.state for cache in caches if isinstance(cache, RecurrentCache))
    mx.eval([part for state in snapshot for part in state if part is not None])
    return snapshot


def hold_snapshot(caches: Sequence[Any], snapshot: Snapshot, length: int) -> None:
    """Let layers with states hold those of a snapshot after `length` tokens."""
    states = [cache for cache in caches if isinstance(cache, RecurrentCache)]
    for cache, state in zip(states, snapshot, strict=True):
        cache.hold(state, length)


def snapshot_nbytes(caches: Iterable[Sequence[Any]], snapshots: Iterable[Snapshot]) -> int:
    """Bytes of snapshots, each array once and none that a cache holds too."""
    held = {id(part) for own in caches for cache in own if isinstance(cache, RecurrentCache) for part in cache.arrays()}
    parts = {id(part): part for snapshot in snapshots for state in snapshot for part in state if part is not None}
    return sum(part.nbytes for key, part in parts.items() if key not in held)


def pack_snapshot(snapshot: Snapshot) -> Leaves:
    """A snapshot as stacked arrays, (layers, ...) each, evaluated; nothing where no layer has states."""
    stacked = {
        name: mx.stack([part for state in snapshot if (part := state[index]) is not None])
        for index, name in enumerate(_STATES)
        if snapshot
    }
    mx.eval(list(stacked.values()))
    return stacked


def unpack_snapshot(leaves: Mapping[str, mx.array], caches: Sequence[Any]) -> Snapshot | None:
    """The snapshot of `pack_snapshot`; None where it is none of as many layers as these caches have states."""
    layers = sum(isinstance(cache, RecurrentCache) for cache in caches)
    if sorted(leaves) != sorted(_STATES if layers else ()) or any(leaf.shape[0] != layers for leaf in leaves.values()):
        return None
    return tuple((leaves[_STATES[0]][layer], leaves[_STATES[1]][layer]) for layer in range(layers))


def copy_prefix(
    source: Sequence[Any], target: Sequence[Any], *, length: int, capacity: int, snapshot: Snapshot | None = None
) -> None:
    """Let empty caches begin as the first `length` tokens of others, with room for `capacity`: one copy, evaluated here, so
    that neither side's next write finds its buffer shared. States are those of a `snapshot` where one is given.

    Raises:
        StageError: states that hold more than `length` tokens.
    """
    made: list[mx.array] = []
    if snapshot is not None:
        hold_snapshot(target, snapshot, length)
    for theirs, ours in zip(source, target, strict=True):
        if isinstance(theirs, RecurrentCache):
            if snapshot is None and not ours.begin_as(theirs, length):
                raise _uncut(theirs, length)
            made += [part for part in ours.state if part is not None]
            continue
        leaves = {name: _resized(leaf, length, max(length, capacity)) for name, leaf in _leaves(theirs)}
        made += leaves.values()
        _put(ours, leaves, length)
    mx.eval(made)


def trim(caches: Sequence[Any], length: int, *, snapshot: Snapshot | None = None) -> None:
    """Forget what is beyond `length` tokens; nothing is copied. States become those of a `snapshot` where one is given.

    Raises:
        StageError: states that cannot go back so far.
    """
    if snapshot is not None:
        hold_snapshot(caches, snapshot, length)
    for cache in caches if snapshot is None else _growing(caches):
        count = cache.offset - length
        if cache.trim(count) != count:
            raise _uncut(cache, length)


def cut(caches: Sequence[Any], start: int, end: int) -> Leaves:
    """The tokens [start, end) of all layers' caches that grow, stacked: arrays (layers, 1, 1, end - start, width), evaluated."""
    parts: dict[str, list[mx.array]] = {}
    for cache in _growing(caches):
        for name, leaf in _leaves(cache):
            parts.setdefault(name, []).append(leaf[..., start:end, :])
    stacked = {name: mx.stack(layers) for name, layers in parts.items()}
    mx.eval(list(stacked.values()))
    return stacked


def append(caches: Sequence[Any], blocks: Mapping[str, mx.array], *, capacity: int) -> None:
    """Put stacked arrays, as `cut` makes them, behind what the caches hold; memory for `capacity` is taken at once."""
    made: list[mx.array] = []
    for layer, cache in enumerate(_growing(caches)):
        start, leaves = cache.offset, dict(_leaves(cache))
        for name, stacked in blocks.items():
            block = stacked[layer]
            end = start + block.shape[2]
            leaf = leaves.get(name)
            if leaf is None:
                leaf = mx.zeros((*block.shape[:2], max(end, capacity), block.shape[-1]), block.dtype)
            elif leaf.shape[2] < end:
                leaf = _resized(leaf, start, max(end, capacity))
            leaf[..., start:end, :] = block
            leaves[name] = leaf
        made += leaves.values()
        _put(cache, leaves, end)
    mx.eval(made)


def growing_layers(caches: Sequence[Any]) -> int:
    """How many of them grow by every token."""
    return sum(1 for _ in _growing(caches))


def trim_growing(caches: Sequence[Any], length: int) -> None:
    """Forget what those that grow hold beyond `length` tokens."""
    for cache in _growing(caches):
        cache.trim(cache.offset - length)


def _growing(caches: Sequence[Any]) -> Iterator[Any]:
    """Those that grow by every token."""
    return (cache for cache in caches if not isinstance(cache, RecurrentCache))


def _uncut(cache: Any, length: int) -> StageError:
    return StageError(
        f"a {type(cache).__name__} cannot give back {cache.offset - length} tokens",
        expected=f"{length} tokens, as the leader counts them",
        found=f"{cache.offset}",
    )


def _resized(leaf: mx.array, length: int, capacity: int) -> mx.array:
    empty = mx.zeros((*leaf.shape[:2], capacity - length, leaf.shape[3]), leaf.dtype)
    return mx.concatenate([leaf[..., :length, :], empty], axis=2)


def _leaves(cache: Any) -> Iterator[tuple[str, mx.array]]:
    for side in ("keys", "values"):
        value = getattr(cache, side)
        if isinstance(value, mx.array):
            yield side, value
        elif value is not None:
            for index, part in enumerate(value):
                yield f"{side}.{index}", part


def _put(cache: Any, leaves: Mapping[str, mx.array], length: int) -> None:
    for side in ("keys", "values"):
        parts = [leaves[name] for name in sorted(leaves) if name.startswith(f"{side}.")]
        setattr(cache, side, tuple(parts) if parts else leaves[side])
    cache.offset = length
