"""Frames: what goes in comes out, and no bytes whatever raise anything but ProtocolError."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from exo_kimi.arch.vision import Grid
from exo_kimi.errors import ProtocolError, StageError
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.protocol import frames as wire
from exo_kimi.runtime.protocol import messages
from exo_kimi.runtime.protocol.faults import to_message
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.steps import (
    Blocks,
    FailedSequence,
    Hidden,
    PictureSpan,
    Proposal,
    Sampled,
    Segment,
    SequenceStart,
    Step,
    StepResult,
)

counts = st.integers(0, 2**63 - 1)
token_ids = st.integers(0, 163_839)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


keys = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), max_size=3).map(tuple)
snapshots = st.text("0123456789abcdef", min_size=31, max_size=31).map(lambda digits: digits + "s")
blocks = st.builds(
    Blocks,
    seq_id=counts,
    offset=counts,
    block_tokens=st.integers(1, 2**31),
    keys=keys,
    snapshot=st.none() | snapshots,
)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
failures = st.builds(
    FailedSequence,
    seq_id=counts,
    stage=counts,
    what=texts,
    **dict.fromkeys(("expected", "found", "where", "fix"), st.none() | texts),
)


proposals = st.builds(
    Proposal,
    seq_id=counts,
    token_ids=st.lists(token_ids, max_size=3).map(tuple),
    judged=counts,
    right=counts,
    lost=st.booleans(),
)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    lengths = draw(st.lists(st.integers(1, 5), max_size=4))
    masks = st.none() | st.binary(max_size=12)
    grids = st.builds(Grid, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
    drawn = st.builds(Picture.of, grids, st.binary(max_size=9))
    pictures = draw(st.lists(drawn, max_size=2, unique_by=lambda picture: picture.digest))
    segments = tuple(
        Segment(
            seq_id=draw(counts),
            offset=draw(counts),
            length=n,
            sample=draw(st.booleans()),
            mask=draw(masks),
            drafts=n // 2,
            draft_masks=tuple(draw(masks) for _ in range(n // 2)) if draw(st.booleans()) else (),
            propose=draw(st.integers(0, 6)),
            snapshot=draw(st.booleans()),
            pictures=tuple(
                PictureSpan(draw(counts), draw(st.integers(1, 9)), draw(st.sampled_from(pictures)).digest, draw(counts))
                for _ in range(draw(st.integers(0, 2)) if pictures else 0)
            ),
        )
        for n in lengths
    )
    tokens = np.array([draw(token_ids) for _ in range(sum(lengths))], np.int32)
    hidden = None
    if draw(st.booleans()):
        width = draw(st.integers(1, 3))
        dtype = draw(st.sampled_from(("float32", "bfloat16", "float16")))
        size = tokens.size * width * (4 if dtype == "float32" else 2)
        data = draw(st.binary(min_size=size, max_size=size))
        hidden = Hidden(dtype=dtype, tokens=tokens.size, hidden_size=width, data=data)
    return Step(
        epoch=draw(counts),
        step_id=draw(counts),
        segments=segments,
        tokens=tokens,
        begin=tuple(draw(st.lists(starts(), max_size=3))),
        free=tuple(draw(st.lists(counts, max_size=3))),
        hidden=hidden,
        restore=tuple(draw(st.lists(blocks, max_size=2))),
        store=tuple(draw(st.lists(blocks, max_size=2))),
        drop=draw(keys),
        forget=tuple(draw(st.lists(st.tuples(counts, st.integers(0, 2**31)), max_size=2))),
        restored=tuple(draw(st.lists(st.tuples(counts, counts), max_size=2))),
        pictures=tuple(pictures),
        failed=tuple(draw(st.lists(failures, max_size=2))),
    )


@st.composite
def starts(draw: st.DrawFn) -> SequenceStart:
    sampling = SamplingParams(
        temperature=draw(finite),
        top_p=draw(finite),
        top_k=draw(counts),
        logit_bias=tuple(draw(st.lists(st.tuples(token_ids, finite), max_size=3))),
        seed=draw(st.none() | st.integers(-(2**63), 2**64 - 1)),
        logprobs=draw(st.booleans()),
        top_logprobs=draw(st.integers(0, 20)),
    )
    history = tuple(draw(st.lists(token_ids, max_size=4)))
    source = draw(st.none() | counts)
    return SequenceStart(
        seq_id=draw(counts),
        prompt_tokens=draw(counts),
        sampling=sampling,
        history=history,
        source=source,
        restore=draw(st.integers(1, 2**31)) if source is not None else 0,
        move=draw(st.booleans()) if source is not None else False,
        seen=tuple(draw(st.lists(token_ids, max_size=3))),
        snapshots=tuple(draw(st.lists(st.integers(1, 2**31), max_size=2))) if source is not None else (),
        request_id=draw(st.text(max_size=20).filter(lambda text: text.isprintable())),
    )


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    logprobs = st.floats(allow_nan=False)
    tops = st.lists(st.tuples(token_ids, logprobs), max_size=3).map(tuple)
    sampled = st.builds(Sampled, seq_id=counts, token_id=token_ids, logprob=st.none() | logprobs, top_logprobs=tops)
    restored = tuple(draw(st.lists(st.tuples(counts, counts), max_size=2)))
    return StepResult(
        epoch=draw(counts),
        step_id=draw(counts),
        sampled=tuple(draw(st.lists(sampled, max_size=3))),
        restored=restored,
        failed=tuple(draw(st.lists(failures, max_size=2))),
        proposals=tuple(draw(st.lists(proposals, max_size=2))),
    )


def controls() -> st.SearchStrategy[Any]:
    return st.one_of([st.builds(cls) for cls in messages.CONTROL_KINDS.values()]).filter(_holdable)


def _holdable(message: Any) -> bool:
    """`builds` draws any int and float for a field; a frame holds the natural and the finite ones."""
    values = [part for value in structs.astuple(message) for part in (value if isinstance(value, tuple) else (value,))]
    return all(
        not (isinstance(value, messages.ExpertTotals) and not _holdable(value))
        and not (type(value) is int and not 0 <= value < 2**63)
        and not (isinstance(value, float) and not math.isfinite(value))
        and not (isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value))
        for value in values
    )


def comparable(step: Step) -> tuple[Any, ...]:
    hidden = step.hidden and dataclasses.replace(step.hidden, data=bytes(step.hidden.data))
    shown = [(picture.grid, picture.pixels, picture.digest) for picture in step.pictures]
    rest = dataclasses.replace(step, hidden=hidden, tokens=None, pictures=())  # type: ignore[arg-type]
    return rest, step.tokens.tolist(), shown


@given(steps())
def test_a_step_arrives_as_it_was_sent(step: Step) -> None:
    arrived = wire.decode(wire.encode(step))
    assert isinstance(arrived, Step)
    assert comparable(arrived) == comparable(step)
    assert arrived.tokens.dtype == np.int32


@given(results())
def test_a_result_arrives_as_it_was_sent(result: StepResult) -> None:
    assert wire.decode(wire.encode(result)) == result


@given(controls())
def test_a_control_message_arrives_as_it_was_sent(message: Any) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_the_log_probability_of_a_broken_model_still_arrives() -> None:
    sampled = Sampled(seq_id=1, token_id=2, logprob=math.nan, top_logprobs=((3, -math.inf),))
    arrived = wire.decode(wire.encode(StepResult(epoch=1, step_id=1, sampled=(sampled,))))
    assert isinstance(arrived, StepResult)
    assert math.isnan(arrived.sampled[0].logprob or 0)
    assert arrived.sampled[0].top_logprobs == ((3, -math.inf),)


@given(st.lists(st.binary(max_size=64), max_size=5))
def test_random_bytes_raise_only_protocol_errors(parts: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(parts)


@given(steps() | results() | controls(), st.data())
def test_a_damaged_frame_is_a_message_or_a_protocol_error(message: Any, data: st.DataObject) -> None:
    parts = [bytearray(part) for part in wire.encode(message)]
    damage = data.draw(st.sampled_from(("flip", "cut", "drop", "repeat")))
    which = data.draw(st.integers(0, len(parts) - 1))
    if damage == "drop":
        del parts[which]
    elif damage == "repeat":
        parts.append(parts[which])
    elif parts[which]:
        at = data.draw(st.integers(0, len(parts[which]) - 1))
        if damage == "cut":
            del parts[which][at:]
        else:
            parts[which][at] ^= data.draw(st.integers(1, 255))
    _decode_or_protocol_error([bytes(part) for part in parts])


@given(st.sampled_from([*sorted(messages.CONTROL_KINDS), "step", "step_result"]), st.data())
def test_any_json_in_a_frame_is_a_message_or_a_protocol_error(kind: str, data: st.DataObject) -> None:
    names = {"step_id", "segments", "begin", "free", "hidden", "sampled", "epoch", "role", "session", "address", "pid"}
    body = data.draw(st.dictionaries(st.sampled_from(sorted(names)), json_values))
    header = json.dumps({"version": messages.PROTOCOL_VERSION, "kind": kind} | body).encode()
    _decode_or_protocol_error([header, *data.draw(st.lists(st.binary(max_size=16), max_size=4))])


def _decode_or_protocol_error(parts: list[bytes]) -> None:
    try:
        decoded = wire.decode(parts)
    except ProtocolError as error:
        assert len(str(error)) < 2000
    else:
        assert type(decoded) in (Step, StepResult, *messages.CONTROL_KINDS.values())


def test_another_protocol_version_is_refused_with_both_versions() -> None:
    (header,) = wire.encode(messages.Ping())
    other = json.loads(bytes(header)) | {"version": 99}
    with pytest.raises(ProtocolError, match=rf"(?s)version {messages.PROTOCOL_VERSION} \(this side\).*version 99"):
        wire.decode([json.dumps(other).encode()])


def test_an_oversized_header_or_part_or_number_of_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_HEADER_BYTES", 100)
    monkeypatch.setattr(wire, "MAX_PART_BYTES", 200)
    monkeypatch.setattr(wire, "MAX_PARTS", 4)
    for parts in ([b"x" * 101], [b"{}", b"x" * 201], [b""] * 5):
        with pytest.raises(ProtocolError, match="too big"):
            wire.decode(parts)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(ProtocolError):
        wire.decode([b"[" * 100_000 + b"]" * 100_000])


def test_a_number_that_json_cannot_hold_is_refused_by_the_sender() -> None:
    start = SequenceStart(seq_id=1, prompt_tokens=1, sampling=SamplingParams(temperature=math.nan))
    step = Step(epoch=1, step_id=1, segments=(), tokens=np.zeros(0, np.int32), begin=(start,))
    with pytest.raises(ProtocolError, match="finite"):
        wire.encode(step)


def test_hidden_states_are_not_copied_on_arrival() -> None:
    data = bytes(8)
    step = Step(
        epoch=1,
        step_id=1,
        segments=(Segment(seq_id=1, offset=0, length=1, sample=True),),
        tokens=np.zeros(1, np.int32),
        hidden=Hidden(dtype="float32", tokens=1, hidden_size=2, data=data),
    )
    arrived = wire.decode(wire.encode(step))
    assert isinstance(arrived, Step) and arrived.hidden is not None
    assert memoryview(arrived.hidden.data).obj is data


@pytest.mark.parametrize(
    ("change", "name", "expected", "found"),
    [
        ({"segments": [[1, -5, 1, True, False, 0, 0, [], False]]}, "segments[0].offset", ">= 0", "-5"),
        ({"segments": [[1, 0]]}, "segments[0]", "length 9", "[1, 0]"),
        ({"epoch": "x"}, "epoch", "`int`", "'x'"),
        ({"step_id": 2**63}, "step_id", "<= 9223372036854775807", str(2**63)),
        ({"extra": 1}, "an unknown member", "no extra", "'extra'"),
        ({"kind": "nope"}, "kind", "step or step_result or hello", "'nope'"),
        ({"hidden": ["int8", 1, 2]}, "hidden.dtype", "float32 or bfloat16 or float16", "'int8'"),
        ({"pictures": [[], [[0, 0, 1, 0, 0]]]}, "a span of a picture", "of 0 pictures", "picture 0"),
        ({"pictures": [[["00" * 16, 1, 0, 2]], []]}, "pictures.pictures[0].rows", ">= 1", "0"),
        ({"prefix": [[], [[1, 2, 3, ["zz"], None]], [], [], []]}, "prefix.store[0].keys[0]", "{32}", "'zz'"),
        ({"prefix": [[], [[1, 2, 3, [], "00" * 16]], [], [], []]}, "prefix.store[0].snapshot", "{31}s", "00"),
    ],
)
def test_a_malformed_header_is_told_by_member_expectation_and_value(
    change: dict[str, object], name: str, expected: str, found: str
) -> None:
    segment = Segment(seq_id=1, offset=0, length=1, sample=True)
    header, *buffers = wire.encode(Step(epoch=1, step_id=1, segments=(segment,), tokens=np.zeros(1, np.int32)))
    with pytest.raises(ProtocolError) as caught:
        wire.decode([json.dumps(json.loads(bytes(header)) | change).encode(), *buffers])
    assert name in caught.value.what
    assert expected in (caught.value.expected or "")
    assert found in (caught.value.found or "")


def test_an_error_about_a_file_whose_name_is_no_utf_8_arrives() -> None:
    fault = to_message(StageError("cannot read", where="/models/\udcff.safetensors"), 1, None)
    arrived = wire.decode(wire.encode(fault))
    assert isinstance(arrived, messages.StageFault)
    assert arrived.where == "/models/\\udcff.safetensors"


@given(st.binary(min_size=1, max_size=200).filter(lambda name: b"\0" not in name))
def test_any_name_of_a_file_arrives(name: bytes) -> None:
    path = Path(os.fsdecode(b"/models/" + name))
    load = messages.Load(
        stage=0,
        directory=messages.encode_path(path),
        start_layer=0,
        end_layer=1,
        dtype=None,
        fingerprint="0",
        kv_bits=None,
    )
    arrived = wire.decode(wire.encode(load))
    assert isinstance(arrived, messages.Load)
    assert messages.decode_path(arrived.directory) == path
