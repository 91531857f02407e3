"""Steps and their results as a JSON header and raw buffers, and back (see `frames` for the frame around them).

    step    [header] [tokens int32] [histories int32] [mask] ... [pixels uint8] ... [hidden states]
    result  [header] [log-probabilities float64]

Tokens and masks stay out of the JSON for their size, log-probabilities because they may be infinite. What comes in lists is a
row of values without names, for the same reason: a step of 64 sequences takes 2 kB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from exo_kimi.arch.vision import Grid
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.prefix_key import KEY_DIGITS, KEY_PATTERN, SNAPSHOT_MARK
from exo_kimi.runtime.protocol.faults import malformed, unicode_text
from exo_kimi.runtime.protocol.messages import Count, Header, Name, Positive
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.steps import (
    Blocks,
    FailedSequence,
    Hidden,
    HiddenDtype,
    PictureSpan,
    Proposal,
    Sampled,
    Segment,
    SequenceStart,
    Step,
    StepResult,
)
from exo_kimi.runtime.transport.link import Part

_HIDDEN_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

Tokens31 = Annotated[int, Meta(ge=0, le=2**31)]
BlockTokens = Annotated[int, Meta(ge=1, le=2**31)]
Digest = Annotated[str, Meta(pattern=rf"\A[0-9a-f]{{{KEY_DIGITS}}}\Z")]
Key = Annotated[str, Meta(pattern=rf"\A{KEY_PATTERN}\Z")]
SnapshotKey = Annotated[str, Meta(pattern=rf"\A[0-9a-f]{{{KEY_DIGITS - 1}}}{SNAPSHOT_MARK}\Z")]


class SamplingHeader(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`requests.SamplingParams` with its bounds. `seed` is checked by hand: msgspec's bounds end at 63 bits."""

    temperature: float
    top_p: float
    top_k: Count
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[Count, float], ...]
    seed: int | None
    logprobs: bool
    top_logprobs: Count


SegmentRow = tuple[Count, Count, Positive, bool, bool, Count, Count, tuple[bool, ...], bool]
SourceRow = tuple[Count | None, Tokens31, bool, tuple[Count, ...], tuple[Tokens31, ...]]
BeginRow = tuple[Count, Count, Count, SamplingHeader, SourceRow | None, Name, Name | None]
BlocksRow = tuple[Count, Count, BlockTokens, tuple[Digest, ...], SnapshotKey | None]
RestoredRow = tuple[Count, Count]
ForgetRow = tuple[Count, Tokens31]
OrdersRow = tuple[
    tuple[BlocksRow, ...], tuple[BlocksRow, ...], tuple[Key, ...], tuple[RestoredRow, ...], tuple[ForgetRow, ...]
]
HiddenRow = tuple[HiddenDtype, Count, Positive]
PictureRow = tuple[Digest, Positive, Positive, Positive]
SpanRow = tuple[Count, Count, Positive, Count, Count]
PicturesRow = tuple[tuple[PictureRow, ...], tuple[SpanRow, ...]]
FailedRow = tuple[Count, Count, str, str | None, str | None, str | None, str | None]
SampledRow = tuple[Count, Count, bool, tuple[Count, ...]]
ProposalRow = tuple[Count, tuple[Count, ...], Count, Count, bool]

_BLOCKS_COLUMNS = ("seq_id", "offset", "block_tokens", "keys", "snapshot")
_RESTORED_COLUMNS = ("seq_id", "tokens")
COLUMNS = {
    "segments[]": ("seq_id", "offset", "length", "sample", "mask", "drafts", "propose", "draft_masks", "snapshot"),
    "begin[]": ("seq_id", "prompt_tokens", "history", "sampling", "source", "request_id", "adapter"),
    "begin[].source": ("source", "restore", "move", "seen", "snapshots"),
    "prefix": ("restore", "store", "drop", "restored", "forget"),
    "prefix.restore[]": _BLOCKS_COLUMNS,
    "prefix.store[]": _BLOCKS_COLUMNS,
    "prefix.restored[]": _RESTORED_COLUMNS,
    "prefix.forget[]": ("seq_id", "position"),
    "hidden": ("dtype", "tokens", "hidden_size"),
    "pictures": ("pictures", "spans"),
    "pictures.pictures[]": ("digest", "frames", "rows", "columns"),
    "pictures.spans[]": ("segment", "start", "tokens", "picture", "first"),
    "sampled[]": ("seq_id", "token_id", "logprob", "top_logprobs"),
    "restored[]": _RESTORED_COLUMNS,
    "proposals[]": ("seq_id", "token_ids", "judged", "right", "lost"),
    "failed[]": ("seq_id", "stage", "what", "expected", "found", "where", "fix"),
}
"""What the values of each row are called in an error."""


class StepHeader(Header, frozen=True, kw_only=True, tag="step"):
    """A Step without its arrays. `mask` and `draft_masks` of a segment and `history` of a start say whether and how much of a
    buffer is theirs; `prefix` is None without orders about blocks, `pictures` without pictures and `failed` without failures, as
    in most steps."""

    epoch: Count
    step_id: Count
    segments: tuple[SegmentRow, ...]
    begin: tuple[BeginRow, ...]
    free: tuple[Count, ...]
    prefix: OrdersRow | None
    hidden: HiddenRow | None
    pictures: PicturesRow | None
    failed: tuple[FailedRow, ...] | None = None


class ResultHeader(Header, frozen=True, kw_only=True, tag="step_result"):
    """A StepResult without its log-probabilities; `logprob` of a row says whether one is there."""

    epoch: Count
    step_id: Count
    sampled: tuple[SampledRow, ...]
    restored: tuple[RestoredRow, ...]
    failed: tuple[FailedRow, ...] | None = None
    proposals: tuple[ProposalRow, ...] | None = None


def encode_step(step: Step) -> tuple[StepHeader, list[Part]]:
    """Header and buffers of a step.

    Raises:
        ProtocolError: a sampling parameter that no header can hold.
    """
    hidden = step.hidden
    header = StepHeader(
        epoch=step.epoch,
        step_id=step.step_id,
        segments=tuple([_segment_row(segment) for segment in step.segments]),
        begin=tuple([_begin_row(start) for start in step.begin]),
        free=step.free,
        prefix=_orders_row(step),
        hidden=None if hidden is None else (hidden.dtype, hidden.tokens, hidden.hidden_size),
        pictures=_pictures_row(step) if step.pictures else None,
        failed=_failed_rows(step.failed),
    )
    history = np.asarray([token for start in step.begin for token in start.history], "<i4")
    buffers: list[Part] = [np.ascontiguousarray(step.tokens, "<i4").tobytes(), history.tobytes()]
    masks = [mask for segment in step.segments for mask in (segment.mask, *segment.draft_masks)]
    buffers += [mask for mask in masks if mask is not None]
    buffers += [picture.pixels for picture in step.pictures]
    if hidden is not None:
        buffers.append(hidden.data)
    return header, buffers


def decode_step(header: StepHeader, buffers: Sequence[Part]) -> Step:
    """The step of a header and the parts after it.

    Raises:
        ProtocolError: they do not fit each other.
    """
    masked = sum([row[4] + sum(row[7]) for row in header.segments])
    picture_rows, span_rows = header.pictures or ((), ())
    wanted = 2 + masked + len(picture_rows) + (header.hidden is not None)
    if len(buffers) != wanted:
        raise malformed("number of buffers", expected=wanted, found=len(buffers))
    masks = iter(buffers[2 : 2 + masked])
    pixels = buffers[2 + masked : 2 + masked + len(picture_rows)]
    spans = _decode_spans(span_rows, picture_rows, segments=len(header.segments))
    segments = tuple(
        [
            Segment(
                seq_id=seq_id,
                offset=offset,
                length=length,
                sample=sample,
                mask=bytes(next(masks)) if mask else None,
                drafts=drafts,
                pictures=spans.get(index, ()),
                draft_masks=tuple([bytes(next(masks)) if one else None for one in draft_masks]),
                propose=propose,
                snapshot=snapshot,
            )
            for index, (seq_id, offset, length, sample, mask, drafts, propose, draft_masks, snapshot) in enumerate(
                header.segments
            )
        ]
    )
    tokens = _int32_array(buffers[0], "tokens")
    length = sum([segment.length for segment in segments])
    if length != tokens.size:
        raise malformed("tokens do not fill the segments", expected=length, found=tokens.size)
    restore, store, drop, restored, forget = header.prefix or ((), (), (), (), ())
    return Step(
        epoch=header.epoch,
        step_id=header.step_id,
        segments=segments,
        tokens=tokens,
        begin=_decode_begin(header.begin, _int32_array(buffers[1], "history")),
        free=header.free,
        hidden=None if header.hidden is None else _decode_hidden(header.hidden, buffers[-1], tokens.size),
        restore=_decode_blocks(restore),
        store=_decode_blocks(store),
        drop=drop,
        forget=forget,
        restored=restored,
        pictures=tuple(
            [
                Picture(Grid(frames, rows, columns), bytes(data), digest)
                for (digest, frames, rows, columns), data in zip(picture_rows, pixels, strict=True)
            ]
        ),
        failed=_decode_failed(header.failed),
    )


def encode_result(result: StepResult) -> tuple[ResultHeader, list[Part]]:
    """Header and buffer of a step's result."""
    logprobs: list[float] = []
    for sampled in result.sampled:
        logprobs += [] if sampled.logprob is None else [sampled.logprob]
        logprobs += [logprob for _, logprob in sampled.top_logprobs]
    header = ResultHeader(
        epoch=result.epoch,
        step_id=result.step_id,
        sampled=tuple(
            [
                (s.seq_id, s.token_id, s.logprob is not None, tuple([token for token, _ in s.top_logprobs]))
                for s in result.sampled
            ]
        ),
        restored=result.restored,
        failed=_failed_rows(result.failed),
        proposals=tuple([(p.seq_id, p.token_ids, p.judged, p.right, p.lost) for p in result.proposals]) or None,
    )
    return header, [np.asarray(logprobs, "<f8").tobytes()]


def decode_result(header: ResultHeader, buffers: Sequence[Part]) -> StepResult:
    """The result of a header and the part after it.

    Raises:
        ProtocolError: they do not fit each other.
    """
    if len(buffers) != 1 or memoryview(buffers[0]).nbytes % 8:
        raise malformed("logprobs", expected="one buffer of doubles", found=len(buffers))
    count = sum([has_logprob + len(top_ids) for _, _, has_logprob, top_ids in header.sampled])
    if count * 8 != memoryview(buffers[0]).nbytes:
        raise malformed("logprobs", expected=f"{count} doubles", found=f"{memoryview(buffers[0]).nbytes} bytes")
    logprobs = iter(np.frombuffer(buffers[0], "<f8").tolist())
    return StepResult(
        epoch=header.epoch,
        step_id=header.step_id,
        sampled=tuple(
            [
                Sampled(
                    seq_id=seq_id,
                    token_id=token_id,
                    logprob=next(logprobs) if has_logprob else None,
                    top_logprobs=tuple([(token, next(logprobs)) for token in top_ids]),
                )
                for seq_id, token_id, has_logprob, top_ids in header.sampled
            ]
        ),
        restored=header.restored,
        failed=_decode_failed(header.failed),
        proposals=tuple(
            [
                Proposal(seq_id=seq_id, token_ids=token_ids, judged=judged, right=right, lost=lost)
                for seq_id, token_ids, judged, right, lost in header.proposals or ()
            ]
        ),
    )


def check_finite(values: Iterable[object], name: str) -> None:
    """Refuse NaN and infinity, which JSON cannot hold and msgspec would write as null.

    Raises:
        ProtocolError: there is one.
    """
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise malformed(f"{name}: a number that JSON cannot hold", expected="finite numbers", found=value)


def _segment_row(segment: Segment) -> SegmentRow:
    masked = tuple([mask is not None for mask in segment.draft_masks])
    return (
        segment.seq_id,
        segment.offset,
        segment.length,
        segment.sample,
        segment.mask is not None,
        segment.drafts,
        segment.propose,
        masked,
        segment.snapshot,
    )


def _begin_row(start: SequenceStart) -> BeginRow:
    sampling = msgspec.convert(start.sampling, SamplingHeader, from_attributes=True)
    check_finite(msgspec.structs.astuple(sampling), "sampling")
    check_finite((bias for _, bias in sampling.logit_bias), "logit_bias")
    source = None
    if start.source is not None or start.seen:
        source = (start.source, start.restore, start.move, start.seen, start.snapshots)
    return (start.seq_id, start.prompt_tokens, len(start.history), sampling, source, start.request_id, start.adapter)


def _decode_begin(rows: tuple[BeginRow, ...], history: npt.NDArray[np.int32]) -> tuple[SequenceStart, ...]:
    starts = []
    taken = 0
    for seq_id, prompt_tokens, count, sampling, source_row, request_id, adapter in rows:
        if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
            raise malformed("seed", expected=f"an integer from {-(2**63)} to {2**64 - 1}", found=sampling.seed)
        source, restore, move, seen, snapshots = source_row or (None, 0, False, (), ())
        if (source is None) != (restore == 0):
            expected = "0 without a source" if source is None else "at least 1 with a source"
            raise malformed("restore", expected=expected, found=restore)
        starts.append(
            SequenceStart(
                seq_id=seq_id,
                prompt_tokens=prompt_tokens,
                sampling=SamplingParams(**msgspec.structs.asdict(sampling)),
                history=tuple(history[taken : taken + count].tolist()),
                source=source,
                restore=restore,
                move=move,
                seen=seen,
                snapshots=snapshots,
                request_id=request_id,
                adapter=adapter,
            )
        )
        taken += count
    if taken != history.size:
        raise malformed("history", expected=f"{taken} tokens", found=history.size)
    return tuple(starts)


def _orders_row(step: Step) -> OrdersRow | None:
    if not (step.restore or step.store or step.drop or step.restored or step.forget):
        return None
    return (_blocks_rows(step.restore), _blocks_rows(step.store), step.drop, step.restored, step.forget)


def _blocks_rows(orders: Iterable[Blocks]) -> tuple[BlocksRow, ...]:
    return tuple([(each.seq_id, each.offset, each.block_tokens, each.keys, each.snapshot) for each in orders])


def _decode_blocks(rows: Iterable[BlocksRow]) -> tuple[Blocks, ...]:
    return tuple(
        [
            Blocks(seq_id=seq_id, offset=offset, block_tokens=block_tokens, keys=keys, snapshot=snapshot)
            for seq_id, offset, block_tokens, keys, snapshot in rows
        ]
    )


def _failed_rows(failed: Iterable[FailedSequence]) -> tuple[FailedRow, ...] | None:
    rows = [
        (
            one.seq_id,
            one.stage,
            unicode_text(one.what),
            unicode_text(one.expected),
            unicode_text(one.found),
            unicode_text(one.where),
            unicode_text(one.fix),
        )
        for one in failed
    ]
    return tuple(rows) or None


def _decode_failed(rows: Iterable[FailedRow] | None) -> tuple[FailedSequence, ...]:
    return tuple(
        [
            FailedSequence(seq_id=seq_id, stage=stage, what=what, expected=expected, found=found, where=where, fix=fix)
            for seq_id, stage, what, expected, found, where, fix in rows or ()
        ]
    )


def _pictures_row(step: Step) -> PicturesRow:
    places = {picture.digest: place for place, picture in enumerate(step.pictures)}
    spans = [
        (index, span.start, span.tokens, places[span.digest], span.first)
        for index, segment in enumerate(step.segments)
        for span in segment.pictures
    ]
    grids = [(p.digest, p.grid.frames, p.grid.rows, p.grid.columns) for p in step.pictures]
    return tuple(grids), tuple(spans)


def _decode_spans(
    rows: tuple[SpanRow, ...], pictures: tuple[PictureRow, ...], *, segments: int
) -> dict[int, tuple[PictureSpan, ...]]:
    """The spans of each segment that has any, by its index."""
    found: dict[int, tuple[PictureSpan, ...]] = {}
    for index, start, tokens, picture, first in rows:
        if index >= segments or picture >= len(pictures):
            raise malformed(
                "a span of a picture",
                expected=f"one of {segments} segments and of {len(pictures)} pictures",
                found=f"segment {index}, picture {picture}",
            )
        span = PictureSpan(start, tokens, pictures[picture][0], first)
        found[index] = (*found.get(index, ()), span)
    return found


def _decode_hidden(row: HiddenRow, data: Part, tokens: int) -> Hidden:
    dtype, rows, hidden_size = row
    view = memoryview(data)
    if rows != tokens or view.nbytes != rows * hidden_size * _HIDDEN_DTYPES[dtype]:
        raise malformed(
            "hidden states",
            expected=f"{tokens} rows of {hidden_size} {dtype}",
            found=f"{rows} rows, {view.nbytes} bytes",
        )
    return Hidden(dtype=dtype, tokens=rows, hidden_size=hidden_size, data=view)


def _int32_array(data: Part, name: str) -> npt.NDArray[np.int32]:
    if memoryview(data).nbytes % 4:
        raise malformed(name, expected="a multiple of 4 bytes", found=memoryview(data).nbytes)
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
