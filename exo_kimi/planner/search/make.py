"""Making a plan: the best split with its bytes and promises, or what is short; it knows nothing of text or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise

from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner import data
from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.plan import VERSION, Plan, PlanModel, PlanPrediction, PlanStage
from exo_kimi.planner.search.advice import changes_that_fit
from exo_kimi.planner.search.cost import Placed, predict
from exo_kimi.planner.search.search import best_split, least_shortage
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import Objective, Workload
from exo_kimi.units import GIB, format_bytes, format_gb

MIB = 1 << 20


def make_plan(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective = "request") -> Plan:
    """The best plan.

    Raises:
        PlanInfeasibleError: nothing fits; says which machine is short, by how much, and what would make it fit.
    """
    stages = best_split(model, cluster, workload, objective)
    if stages is None:
        raise infeasible(model, cluster, workload, objective)
    return plan_of_stages(model, cluster, workload, objective, stages)


def plan_of_stages(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, stages: Sequence[Placed]
) -> Plan:
    """A plan of given stages, with their bytes and promises; it may be over a limit, and then has negative headroom."""
    used = {stage.machine.name for stage in stages}
    prediction = predict(model, cluster, stages, workload)
    return Plan(
        version=VERSION,
        model=PlanModel(
            name=model.name,
            source=model.source,
            hash=model.hash,
            from_headers=model.from_headers,
            layers=model.layers,
            hidden_size=model.config.hidden_size,
            total_bytes=model.total_bytes,
            kv_bits=model.kv_bits,
        ),
        cluster_hash=cluster_hash(cluster),
        workload=workload,
        objective=objective,
        stages=tuple(_stage(model, workload, stage) for stage in stages),
        link=link_of_stages(cluster, stages),
        left_out=tuple(machine.name for machine in cluster.machines if machine.name not in used),
        prediction=PlanPrediction(
            decode_tokens_per_s=_digits(prediction.decode_tokens_per_s),
            tpot_s=_digits(prediction.tpot_s),
            ttft_s=_digits(prediction.ttft_s),
            request_s=_digits(prediction.request_s),
            throughput_tokens_per_s=_digits(prediction.throughput_tokens_per_s),
        ),
        assumptions=tuple(f"{stage.machine.name}: {text}" for stage in stages for text in stage.machine.unknown),
    )


def link_of_stages(cluster: Cluster, stages: Sequence[Placed]) -> str:
    """`jaccl` when all neighbours are linked by RDMA and both have it, as a cluster.toml says with `kind = "rdma"`; a link that
    is only Thunderbolt was priced as TCP, and stays it."""
    pairs = list(pairwise(stage.machine for stage in stages))
    rdma = all(one.rdma and other.rdma and cluster.link(one, other).kind == "rdma" for one, other in pairs)
    return "jaccl" if pairs and rdma else "zmq"


def cluster_hash(cluster: Cluster) -> str:
    """Hash of machines and links, as far as they bear on a plan."""
    machines = [asdict(machine) for machine in cluster.machines]
    links = [
        [one.name, other.name, asdict(cluster.link(one, other))]
        for index, one in enumerate(cluster.machines)
        for other in cluster.machines[index + 1 :]
    ]
    return data.digest([machines, links])


def infeasible(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> PlanInfeasibleError:
    """The error that says which machine is short and what would make it fit."""
    short = least_shortage(model, cluster, workload)
    closest = ", ".join(
        f"{each.machine.name} (layers {each.start_layer}:{each.end_layer}) is short by "
        f"{format_bytes(each.missing_bytes)} ({each.missing_bytes} bytes) of its limit of "
        f"{format_bytes(each.machine.limit_bytes)}"
        for each in short
    )
    names = " and ".join(machine.name for machine in cluster.machines)
    return PlanInfeasibleError(
        f"{model.name} ({model.source}, {format_gb(model.total_bytes)}) does not fit {names} "
        f"with a context of {workload.context} tokens:\n  {closest}",
        short={each.machine.name: each.missing_bytes for each in short},
        changes=changes_that_fit(model, cluster, workload, objective),
    )


def _stage(model: ModelBytes, workload: Workload, stage: Placed) -> PlanStage:
    machine, start, end = stage.machine, stage.start_layer, stage.end_layer
    parts = {
        "weight_bytes": model.weight_bytes(start, end, ends_everywhere=workload.ends_everywhere),
        "kv_bytes": (end - start) * workload.kv_tokens * model.kv_layer_bytes,
        "scratch_bytes": workload.scratch_bytes(model.config),
        "reserve_bytes": workload.reserve_bytes,
        "server_bytes": workload.server_bytes if start == 0 else 0,
    }
    need_bytes = sum(parts.values())
    before = machine.limit_bytes if machine.limit_before_bytes is None else machine.limit_before_bytes
    limit_bytes, source, wired_mb = before, machine.limit.source, None
    if need_bytes > before and machine.limit_before_bytes is not None:
        limit_bytes = min(-(-need_bytes // GIB) * GIB, machine.limit_bytes)
        wired_mb = limit_bytes // MIB
    elif machine.limit_before_bytes is not None:
        source = "as it is, no sysctl needed"
    return PlanStage(
        machine=machine.name,
        chip=machine.chip,
        start_layer=start,
        end_layer=end,
        memory_bytes=machine.memory_bytes,
        limit_bytes=limit_bytes,
        limit_source=source,
        headroom_bytes=limit_bytes - need_bytes,
        wired_limit_mb=wired_mb,
        **parts,
    )


def _digits(number: float) -> float:
    return float(f"{number:.6g}")
