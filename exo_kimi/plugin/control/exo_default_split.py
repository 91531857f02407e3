"""exo's own placement, reproduced: nodes by free memory, layers in proportion to it.

It ignores embeddings, layer 0, KV, scratch, the wired limit and bandwidth, and moves with the free memory of that second.
Source: the behaviour of exo `master/placement_utils.py` and `placement.py` at b5375f8ce, held by outcomes in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from exo_kimi.errors import PlanError


def layers_by_memory(layers: int, available_bytes: Sequence[int]) -> tuple[int, ...]:
    """Layers of each node: its share of all free memory, rounded down; what is left goes to the largest fractions.

    Ties go to the earlier node, and no node stays empty: the fullest gives a layer to each that would.

    Args:
        layers: of the model.
        available_bytes: free memory of each node.

    Raises:
        PlanError: no node, no memory, or fewer layers than nodes.
    """
    total, count = sum(available_bytes), len(available_bytes)
    if not count or total <= 0 or layers < count:
        raise PlanError(
            "exo would refuse",
            expected="free memory, and a layer for every node",
            found=f"{layers} layers, {count} nodes",
        )
    exact = [size / total * layers for size in available_bytes]
    given = [int(share) for share in exact]
    fullest_first = sorted(range(count), key=lambda node: given[node] - exact[node])
    for node in fullest_first[: layers - sum(given)]:
        given[node] += 1
    for node in range(count):
        if given[node] == 0:
            given[given.index(max(given))] -= 1
            given[node] = 1
    return tuple(given)


def nodes_by_memory(storage_bytes: int, available_bytes: Mapping[str, int]) -> tuple[str, ...]:
    """The nodes that exo would take: as few as hold the model together, and of those the ones with the most free memory.

    Whether nodes can reach each other, and who has the files already, is not looked at here.

    Returns:
        Node ids in the order given; empty when all together are too small.
    """
    for count in range(1, len(available_bytes) + 1):
        able = [
            chosen
            for chosen in combinations(available_bytes, count)
            if sum(available_bytes[node] for node in chosen) >= storage_bytes
        ]
        if able:
            return max(able, key=lambda chosen: sum(available_bytes[node] for node in chosen))
    return ()
