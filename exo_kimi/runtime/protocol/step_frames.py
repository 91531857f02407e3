"""Steps and their results as the body of a header and raw buffers, and back; the frame around them is `wire`'s.

    step    [header] [tokens int32] [histories int32] [mask] ... [hidden states]
    result  [header] [log-probabilities float64]

Tokens and masks stay out of the JSON for their size, log-probabilities because they may be infinite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from exo_kimi.runtime.protocol import json_fields as fields
from exo_kimi.runtime.protocol import prefix_frames
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.steps import Hidden, Sampled, Segment, SequenceStart, Step, StepResult
from exo_kimi.runtime.transport.link import Part

_HIDDEN_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def encode_step(step: Step) -> tuple[dict[str, Any], list[Part]]:
    """Body and buffers of a step."""
    body: dict[str, Any] = {
        "step_id": step.step_id,
        "segments": [[s.seq_id, s.offset, s.length, s.sample, s.mask is not None, s.drafts] for s in step.segments],
        "begin": [
            [
                start.seq_id,
                start.prompt_tokens,
                len(start.history),
                dataclasses.asdict(start.sampling),
                prefix_frames.encode_source(start),
            ]
            for start in step.begin
        ],
        "free": list(step.free),
        "prefix": prefix_frames.encode_orders(step),
        "hidden": None,
    }
    history = np.asarray([token for start in step.begin for token in start.history], "<i4")
    buffers: list[Part] = [_int32_bytes(step.tokens), history.tobytes()]
    buffers += [segment.mask for segment in step.segments if segment.mask is not None]
    if step.hidden is not None:
        hidden = step.hidden
        body["hidden"] = [hidden.dtype, hidden.tokens, hidden.hidden_size]
        buffers.append(hidden.data)
    return body, buffers


def decode_step(header: dict[str, Any], buffers: Sequence[Part]) -> Step:
    """The step of a header and the parts after it.

    Raises:
        ProtocolError: they do not describe one.
    """
    rows = [
        fields.items(row, "segment", length=6) for row in fields.items(fields.member(header, "segments"), "segments")
    ]
    masked = sum(fields.boolean(row[4], "mask") for row in rows)
    hidden_row = fields.member(header, "hidden")
    wanted = 2 + masked + (hidden_row is not None)
    if len(buffers) != wanted:
        raise fields.bad("number of buffers", expected=wanted, found=len(buffers))
    masks = iter(buffers[2 : 2 + masked])
    segments = tuple(
        Segment(
            seq_id=fields.integer(row[0], "seq_id"),
            offset=fields.integer(row[1], "offset"),
            length=fields.integer(row[2], "length", low=1),
            sample=fields.boolean(row[3], "sample"),
            mask=bytes(next(masks)) if row[4] else None,
            drafts=fields.integer(row[5], "drafts"),
        )
        for row in rows
    )
    tokens = _int32_array(buffers[0], "tokens")
    if sum(segment.length for segment in segments) != tokens.size:
        raise fields.bad(
            "tokens do not fill the segments", expected=sum(segment.length for segment in segments), found=tokens.size
        )
    return Step(
        epoch=fields.integer(fields.member(header, "epoch"), "epoch"),
        step_id=fields.integer(fields.member(header, "step_id"), "step_id"),
        segments=segments,
        tokens=tokens,
        begin=_decode_begin(header, _int32_array(buffers[1], "history")),
        free=fields.integers(fields.member(header, "free"), "free"),
        hidden=None if hidden_row is None else _decode_hidden(hidden_row, buffers[-1], tokens.size),
        **prefix_frames.decode_orders(fields.member(header, "prefix")),
    )


def _decode_begin(header: dict[str, Any], history: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[SequenceStart, ...]:
    starts = []
    taken = 0
    for item in fields.items(fields.member(header, "begin"), "begin"):
        row = fields.items(item, "begin", length=5)
        count = fields.integer(row[2], "history")
        starts.append(
            SequenceStart(
                seq_id=fields.integer(row[0], "seq_id"),
                prompt_tokens=fields.integer(row[1], "prompt_tokens"),
                sampling=_decode_sampling(fields.mapping(row[3], "sampling")),
                history=tuple(history[taken : taken + count].tolist()),
                **prefix_frames.decode_source(row[4]),
            )
        )
        taken += count
    if taken != history.size:
        raise fields.bad("history", expected=f"{taken} tokens", found=history.size)
    return tuple(starts)


def _decode_sampling(body: dict[str, Any]) -> SamplingParams:
    pairs = [fields.items(pair, "logit_bias", length=2) for pair in fields.items(body.get("logit_bias"), "logit_bias")]
    seed = fields.member(body, "seed")
    return SamplingParams(
        temperature=fields.number(fields.member(body, "temperature"), "temperature"),
        top_p=fields.number(fields.member(body, "top_p"), "top_p"),
        top_k=fields.integer(fields.member(body, "top_k"), "top_k"),
        min_p=fields.number(fields.member(body, "min_p"), "min_p"),
        presence_penalty=fields.number(fields.member(body, "presence_penalty"), "presence_penalty"),
        frequency_penalty=fields.number(fields.member(body, "frequency_penalty"), "frequency_penalty"),
        repetition_penalty=fields.number(fields.member(body, "repetition_penalty"), "repetition_penalty"),
        logit_bias=tuple((fields.integer(a, "logit_bias"), fields.number(b, "logit_bias")) for a, b in pairs),
        seed=None if seed is None else fields.integer(seed, "seed", low=-(2**63), high=2**64 - 1),
        logprobs=fields.boolean(fields.member(body, "logprobs"), "logprobs"),
        top_logprobs=fields.integer(fields.member(body, "top_logprobs"), "top_logprobs"),
    )


def _decode_hidden(row: object, data: Part, tokens: int) -> Hidden:
    dtype, rows, hidden_size = fields.items(row, "hidden", length=3)
    if not isinstance(dtype, str) or dtype not in _HIDDEN_DTYPES:
        raise fields.bad("dtype of hidden states", expected=" or ".join(_HIDDEN_DTYPES), found=dtype)
    rows = fields.integer(rows, "hidden rows")
    hidden_size = fields.integer(hidden_size, "hidden_size", low=1)
    view = memoryview(data)
    if rows != tokens or view.nbytes != rows * hidden_size * _HIDDEN_DTYPES[dtype]:
        raise fields.bad(
            "hidden states",
            expected=f"{tokens} rows of {hidden_size} {dtype}",
            found=f"{rows} rows, {view.nbytes} bytes",
        )
    return Hidden(dtype=dtype, tokens=rows, hidden_size=hidden_size, data=view)  # type: ignore[arg-type]


def encode_result(result: StepResult) -> tuple[dict[str, Any], list[Part]]:
    """Body and buffers of a step's result."""
    rows = [[s.seq_id, s.token_id, s.logprob is not None, [i for i, _ in s.top_logprobs]] for s in result.sampled]
    logprobs: list[float] = []
    for sampled in result.sampled:
        logprobs += [] if sampled.logprob is None else [sampled.logprob]
        logprobs += [logprob for _, logprob in sampled.top_logprobs]
    body = {"step_id": result.step_id, "sampled": rows, "restored": [list(pair) for pair in result.restored]}
    return body, [np.asarray(logprobs, "<f8").tobytes()]


def decode_result(header: dict[str, Any], buffers: Sequence[Part]) -> StepResult:
    """The result of a header and the part after it.

    Raises:
        ProtocolError: they do not describe one.
    """
    if len(buffers) != 1 or memoryview(buffers[0]).nbytes % 8:
        raise fields.bad("logprobs", expected="one buffer of doubles", found=len(buffers))
    logprobs = iter(np.frombuffer(buffers[0], "<f8").tolist())
    sampled = []
    for item in fields.items(fields.member(header, "sampled"), "sampled"):
        seq_id, token_id, has_logprob, top_ids = fields.items(item, "sampled", length=4)
        logprob = next(logprobs, math.nan) if fields.boolean(has_logprob, "logprob") else None
        top = tuple((token, next(logprobs, math.nan)) for token in fields.integers(top_ids, "top_logprobs"))
        sampled.append(
            Sampled(
                seq_id=fields.integer(seq_id, "seq_id"),
                token_id=fields.integer(token_id, "token_id"),
                logprob=logprob,
                top_logprobs=top,
            )
        )
    count = sum((s.logprob is not None) + len(s.top_logprobs) for s in sampled)
    if count * 8 != memoryview(buffers[0]).nbytes:
        raise fields.bad("logprobs", expected=f"{count} doubles", found=f"{memoryview(buffers[0]).nbytes} bytes")
    return StepResult(
        epoch=fields.integer(fields.member(header, "epoch"), "epoch"),
        step_id=fields.integer(fields.member(header, "step_id"), "step_id"),
        sampled=tuple(sampled),
        restored=prefix_frames.decode_restored(fields.member(header, "restored")),
    )


def _int32_bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values, "<i4").tobytes()


def _int32_array(data: Part, name: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    if memoryview(data).nbytes % 4:
        raise fields.bad(name, expected="a multiple of 4 bytes", found=memoryview(data).nbytes)
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
