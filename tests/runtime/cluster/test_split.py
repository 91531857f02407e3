"""Splits: every layer exactly once, as even as can be, and clear numbers when it cannot be."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import SplitError
from exo_kimi.runtime.cluster.split import LayerRange, ModelBytes, balanced_split, parse_split, to_ranges

sizes = st.integers(0, 10**12)


@st.composite
def models(draw: st.DrawFn, most_layers: int = 61) -> ModelBytes:
    layers = draw(st.lists(sizes, min_size=1, max_size=most_layers))
    return ModelBytes(layers=tuple(layers), embedding_bytes=draw(sizes), head_bytes=draw(sizes))


def places_every_layer_once(ranges: tuple[LayerRange, ...], layers: int) -> bool:
    return [layer for start, end in ranges for layer in range(start, end)] == list(range(layers))


@given(models(), st.data())
def test_every_layer_is_assigned_exactly_once_and_no_stage_is_empty(model: ModelBytes, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, min(8, len(model.layers))))
    ranges = balanced_split(model, stages)
    assert len(ranges) == stages
    assert places_every_layer_once(ranges, len(model.layers))
    assert all(start < end for start, end in ranges)


@given(models(most_layers=9), st.data())
def test_no_other_split_has_a_smaller_fullest_stage_nor_is_more_even(model: ModelBytes, data: st.DataObject) -> None:
    layers = len(model.layers)
    stages = data.draw(st.integers(1, layers))

    def cost(ranges: tuple[LayerRange, ...]) -> tuple[int, int]:
        taken = [model.of_range(start, end) for start, end in ranges]
        return max(taken), sum(size**2 for size in taken)

    every = [tuple(pairwise((0, *cuts, layers))) for cuts in combinations(range(1, layers), stages - 1)]
    assert cost(balanced_split(model, stages)) == min(map(cost, every))


def test_the_61_layers_of_k2_are_balanced_with_embedding_and_head_counted() -> None:
    layers = (500, *[8000] * 60)
    model = ModelBytes(layers=layers, embedding_bytes=2000, head_bytes=2000)
    ranges = balanced_split(model, 2)
    assert ranges == ((0, 31), (31, 61))
    assert [model.of_range(*r) for r in ranges] == [242_500, 242_000]


@pytest.mark.parametrize("stages", [0, 8, -1])
def test_a_stage_without_a_layer_is_refused(stages: int) -> None:
    model = ModelBytes(layers=(1,) * 7, embedding_bytes=0, head_bytes=0)
    with pytest.raises(SplitError, match="1 to 7 stages"):
        balanced_split(model, stages)


def test_a_split_is_read() -> None:
    assert parse_split("44,17", 61) == ((0, 44), (44, 61))
    assert parse_split(" 7 ", 7) == ((0, 7),)


def test_a_split_that_does_not_sum_to_the_layers_is_refused_with_the_numbers() -> None:
    with pytest.raises(SplitError, match="sums to 60, the model has 61 layers") as caught:
        parse_split("44,16", 61)
    assert caught.value.fix is not None and "+1" in caught.value.fix


@pytest.mark.parametrize("text", ["", "44,", ",61", "44;17", "61,0", "-1,62", "44,17.0", "4e1,21", "²,59", "9" * 50])
def test_what_is_no_list_of_counts_is_refused(text: str) -> None:
    with pytest.raises(SplitError):
        parse_split(text, 61)


@given(st.text())
def test_any_text_is_a_split_of_all_layers_or_a_split_error(text: str) -> None:
    try:
        ranges = parse_split(text, 7)
    except SplitError:
        return
    assert places_every_layer_once(ranges, 7)


@given(st.lists(st.integers(1, 61), min_size=1, max_size=8))
def test_a_written_split_is_read_back(counts: list[int]) -> None:
    ranges = parse_split(",".join(map(str, counts)), sum(counts))
    assert ranges == to_ranges(counts)
    assert [end - start for start, end in ranges] == counts


def test_the_bytes_of_a_checkpoint_are_all_counted(tmp_path: Path) -> None:
    manifest = resolve(open_index(make_tiny(tmp_path / "tiny")))
    model = ModelBytes.of_manifest(manifest)
    assert model.of_range(0, 7) == manifest.resident_bytes
    for start, end in balanced_split(model, 3):
        assert model.of_range(start, end) == resolve(open_index(tmp_path / "tiny"), start, end).resident_bytes
