"""Checks of this machine: answers, a real layer's speed, its wired limit, reads into MLX's memory, early pieces, a link."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.client.demo import shipped_model
from exo_kimi.dialogue.events import ContentEvent
from exo_kimi.dialogue.prepare import prepare
from exo_kimi.dialogue.request import ConversationRequest, SamplingOverrides
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.owner.service.running import wired_limit_mb, wired_note
from exo_kimi.owner.verify.check import CheckResult
from exo_kimi.planner.plan import read_plan
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.loading.parameter_memory import unfilled
from exo_kimi.runtime.loading.single_layer import LayerReport, run_layer
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel

ANSWERS: Mapping[str, str] = {
    "What is the capital of Norway?": "Oslo",
    "How much is 58 plus 36?": "58 + 36 = 94",
}
ANSWER_TOKENS = 96
LAYER_SLACK = 1.5
"""On a GPU, a layer may take so many times what bandwidth and overhead say: other programs, and what a profile does not know."""
READ_BYTES = 64 << 20
STEPS = 64
PIECE_LAYERS = 2
PIECES_LOSS = 1.25  # early pieces may cost so much where they do not help, and no more


def tiny_answers() -> CheckResult:
    """The shipped tiny Kimi's greedy answers, over two stages on the default device, in bf16 on Metal."""
    directory = shipped_model()
    checkpoint = Checkpoint(directory)
    speaker = Speaker.from_directory(directory, raw_config=checkpoint.raw_config)
    middle, end = checkpoint.config.num_hidden_layers // 2, checkpoint.config.num_hidden_layers
    dtype = None if mx.metal.is_available() else "float32"

    def load() -> list[StageModel]:
        return [load_stage(checkpoint.manifest(*part), dtype=dtype) for part in ((0, middle), (middle, end))]

    async def ask() -> dict[str, str]:
        pipeline = InlinePipeline(load, stages=2, context=2048, kv_capacity_tokens=4096, cache_step=64)
        said = {}
        async with Engine(pipeline) as engine:
            await engine.wait_ready()
            for question in ANSWERS:
                asked = ConversationRequest(
                    messages=({"role": "user", "content": question},),
                    sampling=SamplingOverrides(temperature=0.0),
                    max_tokens=ANSWER_TOKENS,
                )
                (choice,) = prepare(asked, speaker, context=2048).choices
                text = ""
                async with aclosing(choice.generate(engine)) as steps:
                    async for _, events in steps:
                        text += "".join(event.text for event in events if isinstance(event, ContentEvent))
                said[question] = text
        return said

    said = asyncio.run(ask())
    wrong = [f"{question} {said[question]!r}" for question, right in ANSWERS.items() if right not in said[question]]
    return CheckResult.of(not wrong, "; ".join(wrong) or f"{len(said)} answers are right", answers=said)


def real_layer(
    directory: Path | None,
    profile: Mapping[str, Any],
    *,
    layer: int | None = None,
    slack: float | None = None,
    run: Callable[..., LayerReport] = run_layer,
) -> CheckResult:
    """One layer of a real checkpoint: a token's time against what the measured bandwidth and overhead say.

    Args:
        directory: the checkpoint; None skips it.
        profile: of this machine, measured.
        layer: None takes the last, which has experts.
        slack: how many times the expected time it may take; None: only its numbers count.
        run: runs it.
    """
    if directory is None:
        return CheckResult.skipped("no checkpoint was given (--checkpoint DIR)")
    chosen = Checkpoint(directory).config.num_hidden_layers - 1 if layer is None else layer
    found = run(directory, chosen, dtype=None if mx.metal.is_available() else "float32")
    measured = profile["measured"]
    expected_s = found.decode_bytes / measured["bandwidth_bytes_per_s"] + measured["overhead_per_layer_s"]
    rate = found.decode_bytes / found.decode_s
    good = found.output_is_finite and (slack is None or found.decode_s <= slack * expected_s)
    finite = "" if found.output_is_finite else "its output is not finite; "
    told = (
        f"{finite}layer {chosen}: {found.decode_s * 1e3:.2f} ms a token, {rate / 1e9:.1f} GB/s; "
        f"{expected_s * 1e3:.2f} ms by the measured profile"
    )
    return CheckResult.of(
        good,
        told,
        layer=chosen,
        decode_s=found.decode_s,
        expected_s=expected_s,
        decode_bytes=found.decode_bytes,
        decode_bytes_per_s=rate,
        prefill_tokens_per_s=found.prefill_tokens / found.prefill_s,
        load_s=found.load_s,
        disk_bytes=found.disk_bytes,
        finite=found.output_is_finite,
    )


def wired_limit(plan: Path | None, now_mb: Callable[[], int | None] = wired_limit_mb) -> CheckResult:
    """The wired limit against the plan's first stage, and whether MLX may wire what Metal recommends."""
    found = now_mb()
    if found is None:
        return CheckResult.skipped("no wired limit on this system")
    wanted = None if plan is None else read_plan(plan).stages[0].wired_limit_mb
    note = wired_note(wanted, found)
    limit = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
    if note is None and limit is not None:
        mx.set_wired_limit(int(limit))
    told = note or f"{found} MB set (0: macOS' default); Metal recommends at most {limit} bytes"
    return CheckResult.of(note is None, told, wired_limit_mb=found, wanted_mb=wanted, recommended_bytes=limit)


def read_into_arrays(preadv: Callable[..., int] = os.preadv) -> CheckResult:
    """A file read by preadv into the memory of an MLX array, as weights are loaded: the device sees the bytes, twice."""
    words = READ_BYTES // 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"
        written = np.random.default_rng(0).integers(0, 2**31, words, dtype=np.uint32)
        path.write_bytes(written.tobytes())
        descriptor = os.open(path, os.O_RDONLY)
        try:
            began_s = time.perf_counter()
            (array,) = unfilled([((words,), mx.uint32)])
            view = memoryview(array).cast("B")  # type: ignore[arg-type]  # it has the buffer protocol
            done = 0
            while done < READ_BYTES and (count := preadv(descriptor, [view[done:]], done)):
                done += count
            took_s = time.perf_counter() - began_s
            first = _sum_on_device(array)
            view[:4] = b"\xff\xff\xff\x7f"
            second = _sum_on_device(array)
            del view
        finally:
            os.close(descriptor)
    right = int(written.sum(dtype=np.uint64) % 2**32)
    again = (right - int(written[0]) + 0x7FFFFFFF) % 2**32
    good = (done, first, second) == (READ_BYTES, right, again)
    rate = READ_BYTES / took_s
    told = (
        f"{READ_BYTES >> 20} MiB at {rate / 1e9:.1f} GB/s from the file cache" if good else "the array has other bytes"
    )
    return CheckResult.of(good, told, bytes_per_s=rate, bytes_read=done)


def _sum_on_device(array: mx.array) -> int:
    return int(np.array((array * mx.array(1, mx.uint32)).sum())) % 2**32


def early_pieces() -> CheckResult:
    """Decoding with and without beginning on the first layers while the graph of the rest is built: the same, and no slower."""
    checkpoint = Checkpoint(shipped_model())
    dtype = None if mx.metal.is_available() else "float32"
    model = load_stage(checkpoint.manifest(), dtype=dtype, fuse=True)
    before = model.piece_layers
    outputs: dict[int, np.ndarray[Any, Any]] = {}
    medians: dict[int, float] = {}
    try:
        for pieces in (0, PIECE_LAYERS, 0, PIECE_LAYERS):
            model.piece_layers = pieces
            outputs[pieces], seconds = _decode(model)
            medians[pieces] = min(seconds, medians.get(pieces, seconds))
    finally:
        model.piece_layers = before
    same = bool(np.array_equal(outputs[0], outputs[PIECE_LAYERS]))
    ratio = medians[PIECE_LAYERS] / medians[0]
    told = f"{'the same' if same else 'OTHER'} numbers; a token takes {ratio:.2f} times what it takes without"
    return CheckResult.of(
        same and ratio <= PIECES_LOSS, told, with_s=medians[PIECE_LAYERS], without_s=medians[0], ratio=ratio, same=same
    )


def _decode(model: Any) -> tuple[np.ndarray[Any, Any], float]:
    """The last logits of some tokens, and the median seconds of one."""
    caches = model.make_cache()
    seconds = []
    for token in range(STEPS):
        began_s = time.perf_counter()
        logits = model.logits(model.forward_ragged(mx.array([token + 5], mx.int32), [(1, caches)]))
        mx.eval(logits)
        seconds.append(time.perf_counter() - began_s)
    return np.array(logits.astype(mx.float32)), statistics.median(seconds)


def link(address: str | None, measure: Callable[[str, int], Mapping[str, float]]) -> CheckResult:
    """Latency and speed to the other machine.

    Args:
        address: HOST:PORT of its `exo-kimi bench link-speed --listen`; None skips it.
        measure: `latency_s` and `bandwidth_bytes_per_s`.
    """
    if address is None:
        return CheckResult.skipped("no other machine was given (--link HOST:PORT)")
    host, _, port = address.rpartition(":")
    found = measure(host.strip("[]"), int(port))
    told = f"{found['latency_s'] * 1e6:.0f} us, {found['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s"
    good = 0 < found["latency_s"] < LINK_LATENCY_S and found["bandwidth_bytes_per_s"] > LINK_BYTES_PER_S
    return CheckResult.of(good, told, **found)


LINK_LATENCY_S = 2e-3
LINK_BYTES_PER_S = 1e8
"""Worse than 1-Gigabit Ethernet: the cable is not the one that is used."""
