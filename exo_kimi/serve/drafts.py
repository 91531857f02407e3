"""`--draft`: the head of a server, the room that a plan must have for it, and the policy that asks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_kimi.arch.draft_modules import draft_kv_bytes_per_token, feature_bytes_per_token
from exo_kimi.arch.geometry import kv_bytes_per_token
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import DraftManifest, resolve_draft
from exo_kimi.errors import UsageError
from exo_kimi.planner.plan import Plan
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.runtime.cluster.cluster_plan import borrowed_bytes
from exo_kimi.runtime.engine.draft_policy import DraftTokens, HeadPolicy, guess_bytes
from exo_kimi.runtime.reserve import MOST_WAITING, MOST_WAITING_ROWS
from exo_kimi.units import format_bytes

FEATURE_COPIES = 2
"""Features of a chunk lie in one array for each layer and in one for all of them, for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftNeed:
    """What a head takes of the last stage's machine, in bytes.

    Args:
        weights_bytes: of the head, and of what it borrows that the stage does not hold.
        kv_bytes: of its cache, for as many tokens as the stage's own cache is planned for.
        features_bytes: of features: those that wait, of all sequences, and those of one chunk.
    """

    weights_bytes: int
    kv_bytes: int
    features_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.features_bytes


def find_head(directory: Path | None, tokens: DraftTokens, checkpoint: Checkpoint) -> DraftManifest | None:
    """The head of a checkpoint; None where none was named, or it is not to guess anything.

    Raises:
        CheckpointError: it is no head, not complete, or another model's.
    """
    if directory is None or tokens == 0:
        return None
    head = resolve_draft(directory)
    head.config.check_target(checkpoint.config, where=head.directory)
    return head


def head_policy(head: DraftManifest | None, tokens: DraftTokens, model: ModelBytes) -> HeadPolicy | None:
    """What asks the head; None without one."""
    return None if head is None else HeadPolicy.of(tokens, draft_bytes=guess_bytes(head, model.head_bytes))


def draft_need(
    head: DraftManifest, checkpoint: Checkpoint, plan: Plan, *, element_bytes: int, prefill_chunk: int
) -> DraftNeed:
    """What a head takes beside the last stage of a plan.

    Args:
        head: its files.
        checkpoint: of the model.
        plan: made without it.
        element_bytes: of an activation.
        prefill_chunk: tokens of a step at most.
    """
    stage = plan.stages[-1]
    manifest = checkpoint.manifest(stage.start_layer, stage.end_layer)
    per_token = kv_bytes_per_token(
        checkpoint.config,
        stage.start_layer,
        stage.end_layer,
        bytes_per_element=element_bytes,
        kv_bits=plan.model.kv_bits,
    )
    row_bytes = feature_bytes_per_token(head.config, bytes_per_element=element_bytes)
    tokens = stage.kv_bytes // per_token
    return DraftNeed(
        weights_bytes=head.resident_bytes + borrowed_bytes(head, checkpoint, manifest),
        kv_bytes=tokens * draft_kv_bytes_per_token(head.config, bytes_per_element=element_bytes),
        features_bytes=row_bytes * (MOST_WAITING_ROWS + FEATURE_COPIES * prefill_chunk),
    )


def is_planned(head: DraftManifest, checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether a plan was made with the head: its last stage then holds so much more than its layers."""
    stage, model = plan.stages[-1], bytes_of_manifest(checkpoint.manifest())
    layers_bytes = model.weight_bytes(stage.start_layer, stage.end_layer)
    if stage.expert_slots is not None:
        layers_bytes -= sum(model.expert_bytes[stage.start_layer : stage.end_layer])
    borrowed = borrowed_bytes(head, checkpoint, checkpoint.manifest(stage.start_layer, stage.end_layer))
    return stage.weight_bytes == layers_bytes + head.resident_bytes + borrowed


def planned_scratch_bytes(plan: Plan, head: DraftManifest | None) -> int:
    """What a plan leaves every stage for its passes: what a plan with a head counts for features beside them is not theirs."""
    if head is None:
        return min(stage.scratch_bytes for stage in plan.stages)
    row_bytes = feature_bytes_per_token(head.config)
    layers = head.config.feature_layers(plan.model.layers)
    found = []
    for stage in plan.stages:
        rows = plan.workload.prefill_chunk * sum(each < stage.end_layer for each in layers) / len(layers)
        if stage is plan.stages[-1]:
            rows = plan.workload.prefill_chunk + planned_waiting_rows(plan)
        found.append(stage.scratch_bytes - round(rows * row_bytes))
    return min(found)


def planned_waiting_rows(plan: Plan) -> int:
    """Positions of all sequences whose features a plan made with a head has room for, while they wait for it."""
    return plan.workload.concurrency * MOST_WAITING


def check_room(need: DraftNeed, plan: Plan) -> None:
    """Refuse a head that the last stage of a plan has no room for.

    Raises:
        UsageError: with the bytes.
    """
    stage = plan.stages[-1]
    if need.total_bytes > stage.headroom_bytes:
        raise UsageError(
            f"the plan has no room for the draft head on {stage.machine}",
            expected=f"{need.total_bytes} bytes ({format_bytes(need.total_bytes)}) of room: "
            f"head {format_bytes(need.weights_bytes)}, its cache {format_bytes(need.kv_bytes)}, "
            f"features {format_bytes(need.features_bytes)}",
            found=f"{stage.headroom_bytes} bytes ({format_bytes(stage.headroom_bytes)})",
            where="--draft",
            fix="plan again with a smaller --context or --concurrency, or with fewer layers on that machine",
        )
