"""Experts from disk: the same numbers as from memory, in every layout, at every size, by every policy; each read once."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ExpertReadError, TensorFileError, UsageError
from exo_kimi.experts import store
from exo_kimi.experts.budget import ExpertCache, LayerProfile
from exo_kimi.experts.direct import is_direct
from exo_kimi.experts.layout import layouts_of
from exo_kimi.experts.packed import pack_directory
from exo_kimi.experts.policies import POLICY_NAMES
from exo_kimi.models import expert_bank
from exo_kimi.models.expert_bank import ExpertBank, StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load, load_stage
from tests.work import calls_of

EXPERTS, CHOSEN = 8, 4
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 192,  # not a multiple of FP8's 128: ragged blocks
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mlx mixed346": {},
    "mlx dq3 k25": {"recipe": "dq3", "prefix": True},
    "mlx plain": {"recipe": "plain"},
    "int4": {"layout": "int4"},
    "int4 fp32 scales": {"layout": "int4", "scales_dtype": "F32"},
    "fp8": {"layout": "fp8"},
    "bf16": {"layout": "bf16"},
    "fp16": {"layout": "bf16", "dtype": "F16"},
    "fp32": {"layout": "bf16", "dtype": "F32"},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp("stored"), seed=7, config=SMALL, **options)
        return made[key]

    return get


def slot_bytes(directory: Path, dtype: str | None = "F32") -> int:
    """Of one expert of every layer."""
    layouts = layouts_of(resolve(open_index(directory)).sources, floats=dtype)
    return sum(layout.slot_bytes for layout in layouts.values())


def load_streamed(
    directory: Path, slots: int, *, fuse: bool = True, dtype: str | None = "float32", **options: Any
) -> Model:
    floats = {"float32": "F32", "bfloat16": "BF16", None: None}[dtype]
    cache = ExpertCache(budget_bytes=slots * slot_bytes(directory, floats), **options)
    return load_stage(resolve(open_index(directory)), dtype=dtype, fuse=fuse, expert_cache=cache)


def streamed(model: Model) -> StreamedExperts:
    assert model.streamed is not None
    return model.streamed


def run(model: Model, lengths: Sequence[int] = (20, 5), steps: int = 4) -> list[np.ndarray[Any, Any]]:
    """Logits of prompts laid end to end, and then of single tokens of each."""
    caches = [model.make_cache() for _ in lengths]
    tokens = mx.array((np.arange(sum(lengths)) * 7919 % 1000).astype(np.int32))
    outputs = [model.logits(model.forward_ragged(tokens, list(zip(lengths, caches, strict=True))))]
    ends = (np.cumsum(lengths) - 1).tolist()
    token = mx.argmax(outputs[0][mx.array(ends)], axis=-1).astype(mx.int32)
    for _ in range(steps):
        outputs.append(model.logits(model.forward_ragged(token, [(1, cache) for cache in caches])))
        token = mx.argmax(outputs[-1], axis=-1).astype(mx.int32)
    mx.eval(outputs)
    return [np.array(each) for each in outputs]


def same(found: Sequence[np.ndarray[Any, Any]], expected: Sequence[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_numbers_at_every_size(
    stored: Callable[..., Path], options: dict[str, Any]
) -> None:
    directory = stored(**options)
    expected = run(load(directory, dtype="float32", fuse=True))
    for slots in (1, 4, 5, 7):
        model = load_streamed(directory, slots)
        assert same(run(model), expected), slots
        counters = streamed(model).counters
        assert counters.misses and (slots < CHOSEN or counters.hits)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("options", [{}, {"layout": "int4"}], ids=["mlx", "int4"])
def test_fused_or_not_in_one_sequence_or_four(
    stored: Callable[..., Path], options: dict[str, Any], *, fuse: bool
) -> None:
    directory = stored(**options)
    for lengths in ((1,), (33, 1, 5, 2)):
        expected = run(load(directory, dtype="float32", fuse=fuse), lengths)
        assert same(run(load_streamed(directory, 5, fuse=fuse), lengths), expected)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_gives_the_same_numbers(stored: Callable[..., Path], policy: str) -> None:
    directory = stored()
    expected = run(load(directory, dtype="float32", fuse=True), (3, 3), steps=12)
    profile = tuple(LayerProfile(layer=layer, experts=(6, 0, 7)) for layer in (1, 2)) if policy == "pinned" else ()
    model = load_streamed(directory, 5, policy=policy, profile=profile)
    assert same(run(model, (3, 3), steps=12), expected)
    if policy == "pinned":  # two of five slots, and once they are there they stay while a token has room beside them
        run(model, (1,), steps=24)
        assert all({6, 0} <= set(bank.cache.held) for bank in streamed(model).banks.values())


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize(
    "options", [{}, {"layout": "int4", "shards": 3}, {"layout": "fp8"}], ids=["mlx", "int4", "fp8"]
)
def test_past_the_page_cache_the_same_numbers(stored: Callable[..., Path], options: dict[str, Any], slots: int) -> None:
    directory = stored(**options)
    model = load_streamed(directory, slots, reads="direct")
    assert same(run(model), run(load(directory, dtype="float32", fuse=True)))
    found = streamed(model)
    assert found.store.counters.read_bytes == sum(
        bank.cache.counters.misses * bank.layout.disk_bytes for bank in found.banks.values()
    )


@pytest.mark.parametrize("reads", ["cached", "direct"])
@pytest.mark.parametrize("options", [{}, {"layout": "int4"}, {"layout": "fp8"}], ids=["mlx", "int4", "fp8"])
def test_from_packed_records_the_same_numbers_and_bytes(tmp_path: Path, options: dict[str, Any], reads: str) -> None:
    directory = make_tiny(tmp_path / "tiny", seed=7, config=SMALL, **options)
    expected = run(load(directory, dtype="float32", fuse=True))
    plain = load_streamed(directory, 5, reads=reads)
    assert same(run(plain), expected)
    pack_directory(directory, say=lambda _: None)
    model = load_streamed(directory, 5, reads=reads)
    assert {part.entry.file for bank in streamed(model).banks.values() for part in bank.layout.expert_bytes(3)} == {
        f"experts.packed/layer-0000{layer}.records" for layer in (1, 2)
    }
    assert same(run(model), expected)
    found, before = streamed(model).store.counters, streamed(plain).store.counters
    assert found.read_bytes == before.read_bytes and found.reads <= before.reads


def test_what_cannot_be_read_past_the_page_cache_is_read_through_it(stored: Callable[..., Path]) -> None:
    directory = stored()
    model = load_streamed(directory, 5, reads="direct")
    store_of = streamed(model).store
    if not store_of.is_direct:
        pytest.skip("the file system has no such reads")
    plain = load_streamed(directory, 5, reads="cached")
    assert not streamed(plain).store.is_direct
    expected, real, refused = run(plain), store_of._preadv, 0

    def refusing(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        nonlocal refused
        if store_of.is_direct:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, position)

    store_of._preadv = refusing
    assert same(run(model), expected)
    assert refused >= 1 and not store_of.is_direct and store_of.counters.failed == 0


def test_a_failed_read_past_the_page_cache_names_the_tensor(stored: Callable[..., Path]) -> None:
    model = load_streamed(stored(), 5, reads="direct")

    def broken(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        raise OSError(5, "Input/output error")

    streamed(model).store._preadv = broken
    with pytest.raises(ExpertReadError, match=r"cannot read model\.layers\.\d\.mlp"):
        run(model)
    streamed(model).store._preadv = lambda *_: 0
    with pytest.raises(ExpertReadError) as caught:
        run(model)
    assert "the file ends" in str(caught.value.found)


def test_the_page_cache_is_used_where_it_could_hold_half_of_what_is_read() -> None:
    assert is_direct("auto", streamed_bytes=100, free_bytes=49)
    assert not is_direct("auto", streamed_bytes=100, free_bytes=50)
    assert is_direct("direct", streamed_bytes=0, free_bytes=100)
    assert not is_direct("cached", streamed_bytes=100, free_bytes=0)
    with pytest.raises(UsageError, match="no such way of reading"):
        is_direct("mmap", streamed_bytes=1, free_bytes=1)


def test_as_stored_the_same_numbers(stored: Callable[..., Path]) -> None:
    directory = stored(layout="int4")
    expected = run(load(directory, fuse=True), (5,))
    assert same(run(load_streamed(directory, 4, dtype=None), (5,)), expected)


def test_what_is_read_is_what_was_missing(stored: Callable[..., Path]) -> None:
    directory = stored(layout="int4")
    model = load_streamed(directory, 4)
    each = {bank.layout.disk_bytes for bank in streamed(model).banks.values()}
    assert len(each) == 1
    before = kernel_bytes()
    run(model)
    kernel = kernel_bytes() - before
    found, reads = streamed(model).counters, streamed(model).store.counters
    assert reads.experts == found.misses
    assert reads.read_bytes == found.misses * min(each)
    assert 0 <= kernel - reads.read_bytes < 1000  # it counts what asking it read
    assert reads.stall_s > 0 and reads.read_s > 0


def kernel_bytes() -> int:
    """Bytes that read calls gave to this process, as Linux counts them."""
    with Path("/proc/self/io").open("rb", buffering=0) as counts:
        return int(counts.read(1000).split()[1])


def test_a_prompt_reads_each_expert_at_most_once(stored: Callable[..., Path]) -> None:
    model = load_streamed(stored(), 3)
    run(model, (96,), steps=0)
    first = streamed(model).counters
    assert (first.hits, first.misses) == (0, 2 * EXPERTS)
    run(model, (96,), steps=0)
    second = streamed(model).counters
    assert (second.hits, second.misses - first.misses) == (2 * 3, 2 * (EXPERTS - 3))


@pytest.mark.parametrize(("slots", "dtype"), [(1, "float32"), (6, "float32"), (3, "bfloat16")])
def test_a_prompt_is_put_together_in_place_and_gives_the_same_numbers(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, slots: int, dtype: str
) -> None:
    directory = stored(layout="int4")
    monkeypatch.setattr(expert_bank, "KEPT_BYTES", 0)
    model = load_streamed(directory, slots, dtype=dtype)
    under_way: list[int] = []
    real = expert_bank._RowsInParts.begin

    def begin(self: Any, number: int, rows: Any, part: mx.array) -> None:
        real(self, number, rows, part)
        under_way.append(len(self._parts))

    monkeypatch.setattr(expert_bank._RowsInParts, "begin", begin)
    found, expected = run(model, (30, 5), 1), run(load(directory, dtype=dtype, fuse=True), (30, 5), 1)
    assert same(found, expected)
    assert len(under_way) > 6 and max(under_way) <= 2


def test_a_prompt_takes_no_more_memory_than_what_it_returns_and_two_parts(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the input: all rows, and two parts of a quarter at most with what they are made of; parts that were put together at
    the end took 4 times the rows."""
    tokens = 512
    model = load_streamed(stored(), 3)
    rows_bytes = tokens * CHOSEN * SMALL["hidden_size"] * 4
    taken: list[int] = []
    real = ExpertBank._rounds

    def rounds(self: ExpertBank, *arguments: Any) -> mx.array:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        y = real(self, *arguments)
        mx.eval(y)
        taken.append(mx.get_peak_memory() - before)
        return y

    monkeypatch.setattr(ExpertBank, "_rounds", rounds)
    run(model, (tokens,), steps=0)
    assert len(taken) == 2 and max(taken) < 2.5 * rows_bytes


def test_a_layer_that_holds_all_its_experts_has_no_bank(stored: Callable[..., Path]) -> None:
    directory = stored()
    assert load_streamed(directory, EXPERTS).streamed is None
    # Of a budget that is not a multiple of all layers, the first get one more.
    layouts = layouts_of(resolve(open_index(directory)).sources, floats="F32")
    sizes = [layout.slot_bytes for layout in layouts.values()]
    cache = ExpertCache(budget_bytes=(EXPERTS - 1) * sum(sizes) + sizes[0])
    model = load_stage(resolve(open_index(directory)), dtype="float32", fuse=True, expert_cache=cache)
    assert list(streamed(model).banks) == [2]
    assert same(run(model), run(load(directory, dtype="float32", fuse=True)))


def test_a_budget_for_all_experts_costs_a_step_no_call(stored: Callable[..., Path]) -> None:
    """Nothing is read back and nothing asked: the room for streaming is as if it were not there."""
    directory = stored()

    def calls(model: Model) -> int:
        caches = model.make_cache()
        token = mx.array([5], mx.int32)
        for _ in range(2):
            mx.eval(model.forward_ragged(token, [(1, caches)]))
        return calls_of(lambda: mx.eval(model.forward_ragged(token, [(1, caches)])))[1]

    plain = calls(load(directory, dtype="float32", fuse=True))
    assert calls(load_streamed(directory, EXPERTS)) == plain
    assert calls(load_streamed(directory, EXPERTS - 1)) > plain


def test_memory_is_backbone_and_slots_and_stays(stored: Callable[..., Path]) -> None:
    directory = stored(layout="int4")
    before = mx.get_active_memory()
    model = load_streamed(directory, 4, dtype=None)
    held = mx.get_active_memory() - before
    manifest = resolve(open_index(directory))
    backbone = sum(
        source.resident_bytes + source.widened_bytes for source in manifest.sources if source.spec.kind != "experts"
    )
    assert held == pytest.approx(backbone + streamed(model).slot_bytes, rel=0.02)
    run(model, (40,))
    warm = mx.get_active_memory()
    for _ in range(3):
        run(model, (40,))
    assert mx.get_active_memory() <= warm


def test_a_budget_that_holds_no_expert_is_refused_with_the_least(stored: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="expert cache is too small") as caught:
        load_stage(resolve(open_index(stored())), expert_cache=ExpertCache(budget_bytes=10))
    assert caught.value.expected is not None and "at least" in caught.value.expected


class Faulty:
    """preadv that fails when it is told to."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.short = False

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        if self.error is not None:
            raise self.error
        if self.short:
            return 0
        # As a system may: less than asked.
        first = buffers[0]
        return os.preadv(descriptor, [first[: max(1, len(first) // 2)]], position)


@pytest.mark.parametrize("slots", [2, 5])
def test_a_failed_read_names_the_tensor_and_the_next_pass_is_right(stored: Callable[..., Path], slots: int) -> None:
    directory = stored(layout="int4")
    expected = run(load(directory, dtype="float32", fuse=True))
    model = load_streamed(directory, slots)
    faulty = streamed(model).store._preadv = Faulty()
    run(model, (3,), steps=1)
    for fault in ("EIO", "short"):
        faulty.error = OSError(5, "Input/output error") if fault == "EIO" else None
        faulty.short = fault == "short"
        with pytest.raises(
            ExpertReadError, match=r"cannot read model\.layers\.\d\.mlp\.experts\.\d\.\w+_proj\.weight"
        ) as caught:
            run(model)
        assert caught.value.found == "Input/output error" or "the file ends" in str(caught.value.found)
        assert caught.value.where is not None and ".safetensors" in caught.value.where
        faulty.error, faulty.short = None, False
        assert same(run(model), expected)


def test_a_file_that_is_cut_is_an_error_and_one_that_is_removed_is_still_read(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "tiny", seed=7, config=SMALL, layout="int4", shards=2)
    expected = run(load(directory, dtype="float32", fuse=True))
    model = load_streamed(directory, 4)
    files = sorted(directory.glob("*.safetensors"))
    contents = {file: file.read_bytes() for file in files}
    for file in files:
        os.truncate(file, 1000)
    with pytest.raises(ExpertReadError, match="cannot read"):
        run(model)
    for file, data in contents.items():
        file.write_bytes(data)
    assert same(run(model), expected)
    for file in files:
        file.unlink()
    assert same(run(model), expected)
    with pytest.raises(TensorFileError):
        streamed(load_streamed_from(directory, contents))


def load_streamed_from(directory: Path, contents: dict[Path, bytes]) -> Model:
    """A load whose files are gone between the manifest and the reading."""
    for file, data in contents.items():
        file.write_bytes(data)
    manifest = resolve(open_index(directory))
    cache = ExpertCache(budget_bytes=4 * slot_bytes(directory))
    for file in contents:
        file.unlink()
    return load_stage(manifest, dtype="float32", expert_cache=cache)


@pytest.mark.parametrize("inline", [True, False])
def test_a_bug_in_a_reading_thread_leaves_the_slots_in_order(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, *, inline: bool
) -> None:
    monkeypatch.setattr(store, "INLINE_BYTES", 10**9 if inline else 0)
    directory = stored()
    expected = run(load(directory, dtype="float32", fuse=True))
    model = load_streamed(directory, 4)
    real = streamed(model).store._preadv

    def broken(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        raise MemoryError

    streamed(model).store._preadv = broken
    with pytest.raises(MemoryError):
        run(model)
    streamed(model).store._preadv = real
    assert same(run(model), expected)


def test_files_are_closed_with_the_model(stored: Callable[..., Path]) -> None:
    directory = stored(layout="int4")

    def held() -> int:
        links = list(Path("/proc/self/fd").iterdir())
        return sum(link.exists() and link.resolve().parent == directory.resolve() for link in links)

    gc.collect()
    before = held()
    model = load_streamed(directory, 4)
    run(model, (3,), steps=1)
    assert held() > before
    del model
    gc.collect()
    assert held() == before
