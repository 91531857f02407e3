"""Smaller forms of the planned model: their bytes, and what they cost, from reports of `exo-kimi compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import with_experts
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.bytes import ModelBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """A smaller form of the planned model.

    Args:
        name: of the checkpoint, or of the plan that was tried out.
        model: its bytes.
        kl: mean KL of its next tokens in nats, against the original's; `low` and `high` of its 95 % interval.
        bound: whether that is a lower bound.
        closed: gates of replies that it did not pass; None where nobody asked it.
    """

    name: str
    model: ModelBytes
    kl: float
    low: float
    high: float
    bound: bool
    closed: int | None

    @property
    def cost(self) -> str:
        """`KL 0.0156 (0.0038 to 0.0293), gates open`."""
        least = " at least" if self.bound else ""
        gates = {None: "nobody asked it", 0: "gates open"}.get(self.closed, f"{self.closed} gates CLOSED")
        return f"KL{least} {self.kl:.4f} ({self.low:.4f} to {self.high:.4f}), {gates}"


def bytes_to_json(model: ModelBytes) -> dict[str, Any]:
    """What a report says of a model's bytes."""
    return {
        "experts": model.config.n_routed_experts,
        "experts_per_layer": model.config.n_routed_experts_per_layer,
        "layer_bytes": list(model.layer_bytes),
        "expert_bytes": list(model.expert_bytes),
        "expert_disk_bytes": list(model.expert_disk_bytes),
        "embedding_bytes": model.embedding_bytes,
        "head_bytes": model.head_bytes,
        "widened_bytes": list(model.widened_bytes),
        "hash": model.hash,
    }


def pruned_bytes(model: ModelBytes, keep: Mapping[int, int], dropped_layers: Sequence[int] = ()) -> ModelBytes:
    """The same model with fewer experts, and without some layers.

    Args:
        model: as it is, its routers in bf16.
        keep: MoE layer -> experts that stay.
        dropped_layers: that go.
    """
    config, experts = model.config, model.config.n_routed_experts
    layers = [layer for layer in range(model.layers) if layer not in dropped_layers]
    gone = {layer: experts - keep.get(layer, experts) for layer in layers}
    kept = {layer: model.expert_bytes[layer] * (experts - gone[layer]) // experts for layer in layers}
    row_bytes = 2 * config.hidden_size + 4  # of the router, with its correction bias
    return replace(
        model,
        config=with_experts(config, [keep.get(layer, experts) if config.is_moe(layer) else 0 for layer in layers]),
        source=f"{model.source}, pruned",
        from_headers=False,
        layer_bytes=tuple(
            model.layer_bytes[layer] - model.expert_bytes[layer] + kept[layer] - gone[layer] * row_bytes
            for layer in layers
        ),
        expert_bytes=tuple(kept[layer] for layer in layers),
        expert_disk_bytes=tuple(
            model.expert_disk_bytes[layer] * (experts - gone[layer]) // experts for layer in layers
        ),
        widened_bytes=tuple(model.widened_bytes[layer] - gone[layer] * 2 * config.hidden_size for layer in layers),
    )


def read_report(path: Path, planned: ModelBytes) -> MeasuredModel:
    """Read a report of `exo-kimi compare --json`.

    Args:
        path: the report.
        planned: the model that its reference is a form of.

    Raises:
        UsageError: it is no report, says nothing of bytes, or is on a model of other sizes.
    """
    try:
        raw: Any = read_json(path)
        said, kl, gates = raw["bytes"], raw["overall"]["kl"], raw["gates"]
        if said is None:
            raise ValueError("neither side was a directory, so it has no bytes")
        layers = len(said["layer_bytes"])
        counts = said.get("experts_per_layer")
        if counts is None:
            counts = [int(said["experts"]) if planned.config.is_moe(layer) else 0 for layer in range(layers)]
        config = with_experts(planned.config, [int(count) for count in counts])
        model = replace(
            planned,
            name=str(raw["subject"]),
            source="a report",
            hash=str(said["hash"]),
            from_headers=False,
            config=config,
            layer_bytes=tuple(map(int, said["layer_bytes"])),
            expert_bytes=tuple(map(int, said["expert_bytes"])),
            expert_disk_bytes=tuple(map(int, said["expert_disk_bytes"])),
            widened_bytes=tuple(map(int, said["widened_bytes"])),
            embedding_bytes=int(said["embedding_bytes"]),
            head_bytes=int(said["head_bytes"]),
        )
        found = MeasuredModel(
            name=model.name,
            model=model,
            kl=float(kl["value"]),
            low=float(kl["low"]),
            high=float(kl["high"]),
            bound=bool(raw["overall"]["bound"]),
            closed=sum(not gate["passed"] for gate in gates) if gates else None,
        )
    except OSError as error:
        raise UsageError("the report cannot be read", found=error.strerror, where=path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "not a report that can be planned with",
            expected="what `exo-kimi compare DIR DIR2 --json FILE` writes",
            found=f"{type(error).__name__}: {error}",
            where=path,
        ) from None
    if layers > planned.layers or int(said["embedding_bytes"]) > 4 * max(planned.embedding_bytes, 1):
        raise UsageError(
            "the report is on another model",
            expected=f"{planned.layers} layers, as {planned.name} has",
            found=f"{layers} layers",
            where=path,
        )
    return found
