"""Which layers go to which stage: `--split` read strictly, or a split balanced by bytes; it knows nothing of machines.

Ranges are half-open and cover every layer once, in order. Stage 0 also holds the embedding, the last the norm and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.errors import SplitError

LayerRange = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """Resident bytes of a whole model: `layers` per decoder layer, `embedding_bytes` before and `head_bytes` (final norm
    and lm_head) after them."""

    layers: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int

    @classmethod
    def of_manifest(cls, manifest: StageManifest) -> ModelBytes:
        """Add up what MLX will hold of every module of a manifest of all layers."""
        layers = [0] * manifest.config.num_hidden_layers
        embedding_bytes = head_bytes = 0
        for source in manifest.sources:
            if source.spec.layer is not None:
                layers[source.spec.layer] += source.resident_bytes
            elif source.spec.kind == "embedding":
                embedding_bytes += source.resident_bytes
            else:
                head_bytes += source.resident_bytes
        return cls(layers=tuple(layers), embedding_bytes=embedding_bytes, head_bytes=head_bytes)

    def of_range(self, start_layer: int, end_layer: int) -> int:
        """Bytes of a stage that holds these layers."""
        total = sum(self.layers[start_layer:end_layer])
        if start_layer == 0:
            total += self.embedding_bytes
        if end_layer == len(self.layers):
            total += self.head_bytes
        return total


def parse_split(text: str, layers: int) -> tuple[LayerRange, ...]:
    """Ranges of a `--split` such as `44,17`: so many layers per stage, in order.

    Raises:
        SplitError: not a list of positive numbers, or they do not sum to `layers`.
    """
    counts: list[int] = []
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and int(digits[:9]) > 0 and len(digits) < 9):
            raise SplitError(
                "cannot read --split",
                expected="layers per stage, each at least 1, such as 44,17",
                found=repr(text),
                where="--split",
            )
        counts.append(int(digits))
    if sum(counts) != layers:
        raise SplitError(
            f"--split {text} sums to {sum(counts)}, the model has {layers} layers",
            expected=f"{layers} layers over {_stages(len(counts))}",
            found=f"{' + '.join(map(str, counts))} = {sum(counts)}",
            where="--split",
            fix="change one number by " + f"{layers - sum(counts):+d}, or leave --split out to balance by bytes",
        )
    return to_ranges(counts)


def to_ranges(counts: Sequence[int]) -> tuple[LayerRange, ...]:
    """Half-open ranges of layer counts."""
    return tuple(pairwise(accumulate(counts, initial=0)))


def balanced_split(model: ModelBytes, stages: int) -> tuple[LayerRange, ...]:
    """The split whose fullest stage holds the fewest bytes; of those, the most even one (least sum of squares).

    Exact, by two dynamic programs over (stages, layers): first the least possible maximum, then the evenest split under it.

    Args:
        model: bytes of the model; all non-negative.
        stages: at least 1 and at most the number of layers, since a stage without a layer is no stage.

    Raises:
        SplitError: fewer than 1 stage, or more stages than layers.
    """
    layers = len(model.layers)
    if not 1 <= stages <= layers:
        raise SplitError(
            f"cannot spread {layers} layers over {_stages(stages)}",
            expected=f"1 to {layers} stages: each needs a layer",
            found=stages,
            where="--stages",
        )
    smallest_maximum = _best_cuts(model, stages, limit=None)[0]
    cuts = _best_cuts(model, stages, limit=smallest_maximum)[1]
    return tuple(pairwise(cuts))


def _best_cuts(model: ModelBytes, stages: int, limit: int | None) -> tuple[int, list[int]]:
    """Least cost and its cuts. Cost is the maximum of the stages' bytes, or under a `limit` their sum of squares."""
    layers = len(model.layers)
    # best[end] = (cost, cuts) of the layers before `end` with the stages so far; None where there is no way.
    best: list[tuple[int, list[int]] | None] = [(0, [0])] + [None] * layers
    for stage in range(stages):
        reached: list[tuple[int, list[int]] | None] = [None] * (layers + 1)
        last_end = layers - (stages - stage - 1)
        for end in range(stage + 1, last_end + 1):
            for start in range(stage, end):
                before = best[start]
                size_bytes = model.of_range(start, end)
                if before is None or (limit is not None and size_bytes > limit):
                    continue
                cost = max(before[0], size_bytes) if limit is None else before[0] + size_bytes**2
                known = reached[end]
                if known is None or cost < known[0]:
                    reached[end] = (cost, [*before[1], end])
        best = reached
    found = best[layers]
    assert found is not None, "a limit of at least the least maximum always leaves a way"
    return found


def _stages(count: int) -> str:
    return f"{count} stage{'' if count == 1 else 's'}"
