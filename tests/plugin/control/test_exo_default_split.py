"""What exo does by itself, held by outcomes of the real `allocate_layers_proportionally` at b5375f8ce."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import PlanError
from exo_kimi.plugin.control.exo_default_split import layers_by_memory, nodes_by_memory

KNOWN = (
    (61, (512, 192), (44, 17)),
    (61, (480, 150), (46, 15)),
    (61, (470, 171), (45, 16)),
    (61, (430, 180), (43, 18)),
    (61, (500, 140), (48, 13)),
    (61, (128, 128, 128), (21, 20, 20)),
    (61, (512, 512), (31, 30)),
    (7, (4, 4), (4, 3)),
    (7, (1, 100), (1, 6)),
    (3, (1, 1, 1000), (1, 1, 1)),
    (61, (512, 192, 128, 1), (37, 14, 9, 1)),
    (5, (1, 1, 1, 1), (2, 1, 1, 1)),
    (8, (1, 1, 1), (3, 3, 2)),
    (61, (0, 512), (1, 60)),
)


@pytest.mark.parametrize(("layers", "free", "outcome"), KNOWN)
def test_layers_are_those_that_exo_gives(layers: int, free: tuple[int, ...], outcome: tuple[int, ...]) -> None:
    assert layers_by_memory(layers, free) == outcome


@given(st.lists(st.integers(0, 600 << 30), min_size=1, max_size=6).filter(sum), st.integers(0, 60))
def test_every_layer_goes_somewhere_and_no_node_stays_empty(free: list[int], more: int) -> None:
    given_layers = layers_by_memory(len(free) + more, free)
    assert sum(given_layers) == len(free) + more
    assert min(given_layers) >= 1


@pytest.mark.parametrize(("layers", "free"), [(61, ()), (61, (0, 0)), (2, (1, 1, 1))])
def test_what_exo_refuses_is_an_error(layers: int, free: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="exo would refuse"):
        layers_by_memory(layers, free)


@pytest.mark.parametrize(
    ("storage", "free", "chosen"),
    [
        (400, {"a": 480, "b": 170}, ("a",)),
        (500, {"a": 480, "b": 170}, ("a", "b")),
        (100, {"a": 480, "b": 170}, ("a",)),
        (600, {"a": 400, "b": 300, "c": 350}, ("a", "c")),
        (700, {"a": 480, "b": 170}, ()),
    ],
)
def test_exo_takes_as_few_nodes_as_hold_the_model(storage: int, free: dict[str, int], chosen: tuple[str, ...]) -> None:
    assert nodes_by_memory(storage, free) == chosen
