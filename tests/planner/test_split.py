"""Splits: every layer exactly once, as even as can be, and clear numbers when it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import SplitError
from exo_kimi.planner.split import EVENNESS_STEPS, LayerRange, balanced_split, parse_split, to_ranges
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.planner.weights.catalog import published_model

sizes = st.integers(0, 10**12)


def model_of(layers: Sequence[int], embedding_bytes: int, head_bytes: int) -> ModelBytes:
    """A model of these bytes a layer."""
    return ModelBytes(
        name="test",
        config=published_model("kimi-k2.6").config,
        source="test",
        hash="sha256:test",
        from_headers=False,
        layer_bytes=tuple(layers),
        expert_bytes=(0,) * len(layers),
        expert_disk_bytes=(0,) * len(layers),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        widened_bytes=(0,) * len(layers),
    )


@st.composite
def models(draw: st.DrawFn, most_layers: int = 61) -> ModelBytes:
    layers = draw(st.lists(sizes, min_size=1, max_size=most_layers))
    return model_of(layers, draw(sizes), draw(sizes))


def places_every_layer_once(ranges: tuple[LayerRange, ...], layers: int) -> bool:
    return [layer for start, end in ranges for layer in range(start, end)] == list(range(layers))


@given(models(), st.data())
def test_every_layer_is_assigned_exactly_once_and_no_stage_is_empty(model: ModelBytes, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, min(8, model.layers)))
    ranges = balanced_split(model, stages)
    assert len(ranges) == stages
    assert places_every_layer_once(ranges, model.layers)
    assert all(start < end for start, end in ranges)


@given(models(most_layers=9), st.data())
def test_no_other_split_has_a_smaller_fullest_stage_nor_is_more_even(model: ModelBytes, data: st.DataObject) -> None:
    layers = model.layers
    stages = data.draw(st.integers(1, layers))
    step_bytes = max(1, -(-model.weight_bytes(0, layers) // EVENNESS_STEPS))  # evenness is counted in these

    def cost(ranges: tuple[LayerRange, ...]) -> tuple[int, int]:
        taken = [model.weight_bytes(start, end) for start, end in ranges]
        return max(taken), sum((size // step_bytes) ** 2 for size in taken)

    every = [tuple(pairwise((0, *cuts, layers))) for cuts in combinations(range(1, layers), stages - 1)]
    assert cost(balanced_split(model, stages)) == min(map(cost, every))


def test_the_61_layers_of_k2_are_balanced_with_embedding_and_head_counted() -> None:
    layers = (500, *[8000] * 60)
    model = model_of(layers, 2000, 2000)
    ranges = balanced_split(model, 2)
    assert ranges == ((0, 31), (31, 61))
    assert [model.weight_bytes(*r) for r in ranges] == [242_500, 242_000]


@pytest.mark.parametrize("stages", [0, 8, -1])
def test_a_stage_without_a_layer_is_refused(stages: int) -> None:
    model = model_of((1,) * 7, 0, 0)
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


def test_more_stages_than_there_can_be_are_refused() -> None:
    assert parse_split((44, 17), 61, most_stages=2) == ((0, 44), (44, 61))
    with pytest.raises(SplitError, match="at most 1 machines"):
        parse_split((44, 17), 61, most_stages=1, stages="machines")


def test_the_bytes_of_a_checkpoint_are_all_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_tiny(tmp_path / "tiny"))
    model = bytes_of_manifest(checkpoint.manifest())
    for start, end in ((0, 7), *balanced_split(model, 3)):
        part = checkpoint.manifest(start, end)
        assert model.weight_bytes(start, end) == part.resident_bytes + part.widened_bytes
