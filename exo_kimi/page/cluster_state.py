"""The cluster as the page shows it: whole states, each complete in itself, as `/v1/cluster/events` sends them."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel

from exo_kimi.planner.plan import Plan, PlanStage
from exo_kimi.runtime.requests import EngineSnapshot, StageHealth


class PlannedMemory(BaseModel):
    """What the plan keeps on a stage's machine, in bytes; `headroom_bytes` is left of `limit_bytes`."""

    machine: str
    memory_bytes: int
    limit_bytes: int
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    reserve_bytes: int
    server_bytes: int
    headroom_bytes: int


class StageView(BaseModel):
    """One stage, or one node of exo.

    Args:
        id: names it as long as it is there.
        name: of the machine, or the stage's number.
        state: `starting`, `loading`, `warming`, `ready`, `stalled` or `dead`.
        start_layer, end_layer: half-open; null where a node has no layers.
        silent_s: since it was last heard.
        loaded_bytes, total_bytes: of the weights that are being read.
        weights_bytes, kv_bytes, peak_bytes: held now, held now, and held at most.
        memory_bytes: of the machine, where it is known.
        experts_asked, experts_held: experts that passes asked for where some stay on disk, and how many were in memory.
        experts_read_bytes: of them from disk.
        compute_s: seconds that it has computed in all; null where it does not tell.
        plan: null without a plan.
    """

    id: str
    name: str
    address: str
    state: str
    start_layer: int | None
    end_layer: int | None
    silent_s: float = 0.0
    loaded_bytes: int = 0
    total_bytes: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    peak_bytes: int = 0
    memory_bytes: int | None = None
    sequences: int = 0
    restarts: int = 0
    experts_asked: int = 0
    experts_held: int = 0
    experts_read_bytes: int = 0
    compute_s: float | None = None
    last_error: str | None = None
    plan: PlannedMemory | None = None


class RequestView(BaseModel):
    """One request: `prompt_done` of `prompt_tokens` are read."""

    id: str
    state: Literal["waiting", "prefill", "decode"]
    prompt_tokens: int
    prompt_done: int
    cached_tokens: int
    generated_tokens: int


class Totals(BaseModel):
    """Counts since the start; they only grow, so the difference of two states is a speed."""

    requests: int
    failed: int
    cancelled: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    restarts: int
    draft_tokens: int
    draft_tokens_accepted: int


class PredictedSpeed(BaseModel):
    """What the plan promises for its workload."""

    decode_tokens_per_s: float
    ttft_s: float
    request_s: float
    throughput_tokens_per_s: float


class ClusterPicture(BaseModel):
    """Everything that the cluster's view shows.

    Args:
        kind: whose cluster it is.
        time_s: of a clock that only differences of two states mean something of.
        reason: why it is not ready.
        context: in tokens, 0 while it is not known.
        kv_capacity_tokens, kv_reserved_tokens, kv_prefix_tokens: that fit, of sequences, and kept of ended ones.
        events: what happened, the oldest first.
    """

    kind: Literal["exo-kimi", "exo"]
    time_s: float
    ready: bool
    reason: str | None
    model: str | None
    version: str | None
    context: int
    kv_capacity_tokens: int = 0
    kv_reserved_tokens: int = 0
    kv_prefix_tokens: int = 0
    stages: list[StageView]
    requests: list[RequestView]
    totals: Totals | None
    prediction: PredictedSpeed | None
    events: list[str]


def engine_state(
    snapshot: EngineSnapshot, *, model: str, version: str, reason: str | None, plan: Plan | None
) -> ClusterPicture:
    """The state of a server of ours.

    Args:
        snapshot: one look at its engine.
        model: the served name.
        version: of this package.
        reason: why it is not ready; None when it is.
        plan: that it follows, if any.
    """
    planned = plan.stages if plan is not None and len(plan.stages) == len(snapshot.stages) else ()
    return ClusterPicture(
        kind="exo-kimi",
        time_s=time.monotonic(),
        ready=reason is None,
        reason=reason,
        model=model,
        version=version,
        context=snapshot.context,
        kv_capacity_tokens=snapshot.kv_capacity_tokens,
        kv_reserved_tokens=snapshot.kv_reserved_tokens,
        kv_prefix_tokens=snapshot.kv_prefix_tokens,
        stages=[
            _stage(stage, planned[index] if planned else None, called=_name(stage, planned, index))
            for index, stage in enumerate(snapshot.stages)
        ],
        requests=[
            RequestView(
                id=request.request_id,
                state=request.state,
                prompt_tokens=request.prompt_tokens,
                prompt_done=request.prompt_done,
                cached_tokens=request.cached_tokens,
                generated_tokens=request.generated_tokens,
            )
            for request in snapshot.requests
        ],
        totals=Totals(
            requests=snapshot.requests_total,
            failed=snapshot.requests_failed_total,
            cancelled=snapshot.requests_cancelled_total,
            prompt_tokens=snapshot.prompt_tokens_total,
            cached_tokens=snapshot.cached_tokens_total,
            generated_tokens=snapshot.generated_tokens_total,
            preemptions=snapshot.preemptions_total,
            steps=snapshot.steps_total,
            restarts=snapshot.restarts_total,
            draft_tokens=snapshot.draft_tokens_total,
            draft_tokens_accepted=snapshot.draft_tokens_accepted_total,
        ),
        prediction=None if plan is None else _prediction(plan),
        events=list(snapshot.events),
    )


def _name(stage: StageHealth, planned: tuple[PlanStage, ...], index: int) -> str:
    return f"{stage.stage} · {planned[index].machine}" if planned else f"{stage.stage} · {stage.address}"


def _stage(stage: StageHealth, planned: PlanStage | None, *, called: str) -> StageView:
    memory = None
    if planned is not None:
        memory = PlannedMemory(**{name: getattr(planned, name) for name in PlannedMemory.model_fields})
    experts = stage.experts
    return StageView(
        id=str(stage.stage),
        name=called,
        address=stage.address,
        state=stage.state,
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        silent_s=round(stage.silent_s, 1),
        loaded_bytes=stage.loaded_bytes,
        total_bytes=stage.total_bytes,
        weights_bytes=stage.weights_bytes,
        kv_bytes=stage.kv_bytes,
        peak_bytes=stage.peak_bytes,
        memory_bytes=None if planned is None else planned.memory_bytes,
        sequences=stage.sequences,
        restarts=stage.restarts,
        experts_asked=0 if experts is None else experts.hits + experts.misses,
        experts_held=0 if experts is None else experts.hits,
        experts_read_bytes=0 if experts is None else experts.read_bytes,
        compute_s=stage.compute_s,
        last_error=stage.last_error,
        plan=memory,
    )


def _prediction(plan: Plan) -> PredictedSpeed:
    made = plan.prediction
    return PredictedSpeed(**{name: getattr(made, name) for name in PredictedSpeed.model_fields})
