"""Plans for legacy exo, by shape and not from headers, so that one fits every tiny Kimi."""

from __future__ import annotations

from exo_kimi.planner.plan import VERSION, Plan, PlanModel, PlanPrediction, PlanStage
from exo_kimi.planner.workload import Workload


def plan_of_shape(split: tuple[int, ...] = (5, 2), *, context: int = 8192, layers: int = 7, width: int = 256) -> Plan:
    """Machines `node1`, `node2`, ... with so many layers each."""
    ends = [sum(split[: index + 1]) for index in range(len(split))]
    gib = 1 << 30
    stages = tuple(
        PlanStage(
            machine=f"node{index + 1}",
            chip="Apple M3 Ultra",
            start_layer=end - count,
            end_layer=end,
            memory_bytes=512 * gib,
            limit_bytes=384 * gib,
            limit_source="Metal's default",
            weight_bytes=100 * gib,
            kv_bytes=gib,
            scratch_bytes=gib,
            reserve_bytes=8 * gib,
            server_bytes=0,
            headroom_bytes=274 * gib,
            wired_limit_mb=None,
        )
        for index, (count, end) in enumerate(zip(split, ends, strict=True))
    )
    model = PlanModel(
        name="tiny",
        source="recipe mixed346",
        hash="0" * 64,
        from_headers=False,
        layers=layers,
        hidden_size=width,
        total_bytes=100 * gib,
        kv_bits=None,
    )
    prediction = PlanPrediction(
        decode_tokens_per_s=1.0,
        slow_tokens_per_s=1.0,
        fast_tokens_per_s=1.0,
        first_tokens_per_s=1.0,
        last_tokens_per_s=1.0,
        tpot_s=1.0,
        ttft_s=1.0,
        request_s=1.0,
        throughput_tokens_per_s=1.0,
    )
    return Plan(
        version=VERSION,
        model=model,
        cluster_hash="0",
        workload=Workload(context=context),
        objective="request",
        stages=stages,
        link="zmq",
        left_out=(),
        prediction=prediction,
        assumptions=(),
    )
