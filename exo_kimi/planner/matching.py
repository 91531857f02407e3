"""The check that a plan was made for a checkpoint."""

from __future__ import annotations

from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.vision import NoVision, VisionManifest
from exo_kimi.errors import PlanMismatchError
from exo_kimi.planner.plan import Plan
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.units import format_bytes


def check_matches(plan: Plan, manifest: StageManifest) -> None:
    """Refuse a plan made for another checkpoint.

    Args:
        plan: from headers, it must carry the checkpoint's fingerprint; from a recipe, the checkpoint must have the same
            layers and width, and no stage may be heavier than planned.
        manifest: of the whole model.

    Raises:
        PlanMismatchError: with both sides.
    """
    fix = "plan again for this checkpoint: `exo-kimi plan DIR --cluster ...`"
    config = manifest.config
    if plan.model.from_headers:
        if plan.model.hash != manifest.fingerprint:
            raise PlanMismatchError(
                "the plan was made for another checkpoint",
                expected=f"{plan.model.hash} ({plan.model.name})",
                found=manifest.fingerprint,
                where=manifest.directory,
                fix=fix,
            )
        return
    planned, found = (plan.model.layers, plan.model.hidden_size), (config.num_hidden_layers, config.hidden_size)
    if planned != found:
        raise PlanMismatchError(
            "the plan was made for another architecture",
            expected=f"{planned[0]} layers of width {planned[1]}",
            found=f"{found[0]} layers of width {found[1]}",
            where=manifest.directory,
            fix=fix,
        )
    model = bytes_of_manifest(manifest)
    for stage in plan.stages:
        ends = plan.workload.ends_everywhere
        weight_bytes = model.weight_bytes(stage.start_layer, stage.end_layer, ends_everywhere=ends)
        if stage.expert_slots is not None:
            weight_bytes -= sum(model.expert_bytes[stage.start_layer : stage.end_layer])
        if weight_bytes > stage.weight_bytes:
            raise PlanMismatchError(
                f"layers {stage.start_layer}:{stage.end_layer} are heavier than the plan's recipe says",
                expected=f"at most {stage.weight_bytes} bytes ({plan.model.source})",
                found=f"{weight_bytes} bytes",
                where=manifest.directory,
                fix=fix,
            )


def check_tower_planned(plan: Plan, manifest: StageManifest, tower: VisionManifest | NoVision) -> None:
    """Refuse a vision tower that a plan has no room for.

    Args:
        plan: that matches the checkpoint.
        manifest: of the whole model.
        tower: what the first stage is to hold beside its layers.

    Raises:
        PlanMismatchError: with the bytes.
    """
    if isinstance(tower, NoVision) or plan.workload.ends_everywhere:
        return
    first = plan.stages[0]
    model = bytes_of_manifest(manifest).with_tower(tower)
    weight_bytes = model.weight_bytes(first.start_layer, first.end_layer)
    if first.expert_slots is not None:
        weight_bytes -= sum(model.expert_bytes[first.start_layer : first.end_layer])
    if weight_bytes > first.weight_bytes:
        raise PlanMismatchError(
            "the plan has no room for the vision tower",
            expected=f"at most {format_bytes(first.weight_bytes)} on the first stage",
            found=f"{format_bytes(weight_bytes)}, {format_bytes(model.vision_bytes)} of them for pictures",
            where=manifest.directory,
            fix="plan again for this checkpoint (its tower is counted), or serve text alone with --no-vision",
        )
