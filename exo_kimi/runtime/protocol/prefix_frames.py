"""What a step says about prefixes, as members of its header and back (see `step_frames`); it decides nothing."""

from __future__ import annotations

from typing import Any

from exo_kimi.runtime.prefix_key import is_key
from exo_kimi.runtime.protocol import json_fields as fields
from exo_kimi.runtime.steps import Blocks, SequenceStart, Step


def encode_source(start: SequenceStart) -> list[Any] | None:
    """Where a sequence's caches begin from; None for empty ones."""
    if start.source is None and not start.seen:
        return None
    return [start.source, start.restore, start.move, list(start.seen)]


def decode_source(row: object) -> dict[str, Any]:
    """Fields of a SequenceStart.

    Raises:
        ProtocolError: the row does not describe them.
    """
    if row is None:
        return {}
    source, restore, move, seen = fields.items(row, "source", length=4)
    return {
        "source": None if source is None else fields.integer(source, "source"),
        "restore": fields.integer(
            restore, "restore", low=0 if source is None else 1, high=0 if source is None else 2**31
        ),
        "move": fields.boolean(move, "move"),
        "seen": fields.integers(seen, "seen"),
    }


def encode_orders(step: Step) -> list[Any] | None:
    """A step's orders about blocks; None when there are none, as in most steps."""
    if not (step.restore or step.store or step.drop or step.restored):
        return None
    return [
        [_encode_blocks(blocks) for blocks in step.restore],
        [_encode_blocks(blocks) for blocks in step.store],
        list(step.drop),
        [list(pair) for pair in step.restored],
    ]


def decode_orders(row: object) -> dict[str, Any]:
    """Fields of a Step.

    Raises:
        ProtocolError: the row does not describe them.
    """
    if row is None:
        return {}
    restore, store, drop, restored = fields.items(row, "prefix", length=4)
    return {
        "restore": tuple(_decode_blocks(item) for item in fields.items(restore, "restore")),
        "store": tuple(_decode_blocks(item) for item in fields.items(store, "store")),
        "drop": _keys(drop),
        "restored": decode_restored(restored),
    }


def decode_restored(rows: object) -> tuple[tuple[int, int], ...]:
    """(sequence, tokens) pairs.

    Raises:
        ProtocolError: these are none.
    """
    pairs = [fields.items(row, "restored", length=2) for row in fields.items(rows, "restored")]
    return tuple((fields.integer(seq_id, "seq_id"), fields.integer(tokens, "tokens")) for seq_id, tokens in pairs)


def _encode_blocks(blocks: Blocks) -> list[Any]:
    return [blocks.seq_id, blocks.offset, blocks.block_tokens, list(blocks.keys)]


def _decode_blocks(item: object) -> Blocks:
    seq_id, offset, block_tokens, keys = fields.items(item, "blocks", length=4)
    return Blocks(
        seq_id=fields.integer(seq_id, "seq_id"),
        offset=fields.integer(offset, "offset"),
        block_tokens=fields.integer(block_tokens, "block_tokens", low=1, high=2**31),
        keys=_keys(keys),
    )


def _keys(value: object) -> tuple[str, ...]:
    keys = fields.items(value, "keys")
    for key in keys:
        if not is_key(key):
            raise fields.bad("a block's key", expected="32 hexadecimal digits", found=key)
    return tuple(keys)
