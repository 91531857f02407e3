"""The planner's promise against the clock: a tiny model over three stage processes of this machine.

    exo-kimi bench plan [--stages N] [--rounds N]
    exo-kimi bench plan --published

Measures this machine's profile, plans, serves with the plan's split, and times decoding. With --published nothing is run: the
laws are held against published measurements of Macs. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.arch.config import KimiConfig
from exo_kimi.bench.claims.machine import lower_quartile, measure
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.planner.command import model_bytes
from exo_kimi.planner.machines.cluster import NetworkLink, make_cluster
from exo_kimi.planner.machines.hardware import Machine, machine_of_profile
from exo_kimi.planner.published.judge import judge, judged_json, judged_text
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit, Prediction
from exo_kimi.planner.workload import Workload, make_workload
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams

# Wide enough that a layer's weights outweigh the hop between two processes; 24 MB of weights a token.
CONFIG = {
    "num_hidden_layers": 9,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
PROMPT, NEW = 32, 48
LOOPBACK = NetworkLink(kind="loopback", latency_s=85e-6, bandwidth_bytes_per_s=2e9, source="reference/mlx.md")


def run(*, stages: int, rounds: int) -> dict[str, Any]:
    """Predicted and measured seconds per token, round by round with a fresh profile each, and their median deviation."""
    with tempfile.TemporaryDirectory() as folder:
        directory = make_tiny(Path(folder) / "tiny", recipe="uniform4", config=CONFIG)
        counts = [len(part) for part in _even(range(CONFIG["num_hidden_layers"]), stages)]
        rows = []
        for _ in range(rounds):
            machine = machine_of_profile(measure(), where="this machine")
            promised = promise(directory, machine, counts)
            measured_s = asyncio.run(decode_s(directory, counts))
            rows.append({"predicted_s": promised.tpot_s, "measured_s": measured_s})
    deviations = [row["predicted_s"] / row["measured_s"] - 1 for row in rows]
    return {"stages": stages, "split": counts, "rounds": rows, "median_deviation": statistics.median(deviations)}


def promise(directory: Path, machine: Machine, counts: Sequence[int]) -> Prediction:
    """What the laws say of equal machines that take turns."""
    model = model_bytes(directory=directory)
    cluster = make_cluster([replace(machine, name=f"stage{index}") for index in range(len(counts))])
    names = [each.name for each in cluster.machines]
    links = {frozenset((one, other)): LOOPBACK for one in names for other in names if one != other}
    question = Question(model=model, cluster=replace(cluster, links=links), workload=workload_of(model.config))
    return PlacedSplit.given(question, counts, question.machines).prediction


def workload_of(config: KimiConfig) -> Workload:
    """The request that is timed."""
    return make_workload(config, context=256, prompt_tokens=PROMPT, new_tokens=NEW, reserve_bytes=0, server_bytes=0)


async def decode_s(directory: Path, counts: Sequence[int]) -> float:
    """Seconds between two tokens of one sequence (lower quartile), over stage processes of this machine."""
    dtype = None if mx.metal.is_available() else "float32"
    plan = make_plan(Checkpoint(directory), split=",".join(map(str, counts)), dtype=dtype)
    cluster = StageCluster(plan, ClusterOptions(context=256))
    engine = Engine(cluster, context=256)
    await cluster.start()
    async with engine:
        await engine.wait_ready()
        await _gaps(engine, "warm")
        return lower_quartile(await _gaps(engine, "timed"))


async def _gaps(engine: Engine, name: str) -> list[float]:
    greedy = SamplingParams(temperature=0.0)
    prompt = tuple(range(1, PROMPT + 1))
    request = GenerationRequest(request_id=name, prompt_ids=prompt, max_tokens=NEW, sampling=greedy)
    times = [time.perf_counter() async for _ in engine.generate(request)]
    return [after - before for before, after in pairwise(times)]


def _even(layers: Sequence[int], stages: int) -> list[Sequence[int]]:
    bounds = [len(layers) * stage // stages for stage in range(stages + 1)]
    return [layers[start:end] for start, end in pairwise(bounds)]


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench plan", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stages", type=int, default=3, help="stage processes (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="profiles and runs, taken in turn (default 5)")
    parser.add_argument("--published", action="store_true", help="the laws against published measurements of Macs")
    options = parser.parse_args(arguments)
    if options.published:
        judged = judge()
        print(judged_text(judged))
        print(json.dumps({"bench": "plan", "published": judged_json(judged)}, sort_keys=True))
        return
    result = run(stages=options.stages, rounds=options.rounds)
    print(f"{'predicted':>12} {'measured':>12} {'deviation':>10}")
    for row in result["rounds"]:
        deviation = row["predicted_s"] / row["measured_s"] - 1
        print(f"{row['predicted_s'] * 1000:9.2f} ms {row['measured_s'] * 1000:9.2f} ms {deviation:>+10.1%}")
    print(json.dumps({"bench": "plan", **result}, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
