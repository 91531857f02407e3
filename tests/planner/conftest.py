"""Models, clusters and random instances for the planner's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from exo_kimi.planner.machines.cluster import Cluster, NetworkLink, make_cluster, read_cluster
from exo_kimi.planner.machines.hardware import Machine, Value
from exo_kimi.planner.question import Question
from exo_kimi.planner.streaming import Streaming, default_curve
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.catalog import published_model
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.planner.workload import Objective, Workload, make_workload

GIB = 1 << 30


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], ModelBytes]:
    """K2.6 by recipe name."""
    config = published_model("kimi-k2.6").config
    return lambda recipe: bytes_of_recipe(config, load_recipe(recipe), name="kimi-k2.6")


@pytest.fixture(scope="session")
def ask(model_of: Callable[[str], ModelBytes]) -> Callable[..., Question]:
    """A question of K2.6: `ask(recipe, cluster, objective="latency", context=4096)`."""

    def question(recipe: str, cluster: str, objective: Objective = "request", **work: int) -> Question:
        model = model_of(recipe)
        workload = make_workload(model.config, **work)
        return Question(model=model, cluster=read_cluster(cluster), workload=workload, objective=objective)

    return question


@pytest.fixture(scope="session")
def founding() -> Cluster:
    """The founding cluster: M3 Ultra 512 GB and M2 Ultra 192 GB."""
    return read_cluster("m3-ultra-512, m2-ultra-192")


@pytest.fixture(scope="session")
def random_case() -> Callable[..., Question]:
    """Small models, clusters and workloads with memory that is often scarce and links that often differ."""
    return _random_case


def _random_case(random: Random, objective: Objective = "request", *, streaming: bool = False) -> Question:
    layers = random.randint(1, 12)
    config = published_model("kimi-k2.6").config
    experts = [random.choice((0, random.randrange(1, 20) * 100_000_000)) for _ in range(layers)]
    model = ModelBytes(
        name="random",
        config=config,
        source="random",
        hash="sha256:random",
        from_headers=False,
        layer_bytes=tuple(size + random.randrange(1, 10) * 10_000_000 for size in experts),
        expert_bytes=tuple(experts),
        expert_disk_bytes=tuple(size * 9 // 10 for size in experts),
        embedding_bytes=random.randrange(0, 1_000_000_000),
        head_bytes=random.randrange(0, 1_000_000_000),
        widened_bytes=tuple(random.randrange(0, 10_000_000) for _ in range(layers)),
    )
    chips = [_random_machine(random, index, model.total_bytes) for index in range(random.randint(1, 4))]
    machines = [random.choice(chips) for _ in range(random.choice((1, 2, 2, 3, 3, 4, 5)))]
    cluster = make_cluster(machines)
    names = [machine.name for machine in cluster.machines]
    links = {
        frozenset((one, other)): NetworkLink(
            kind="random",
            latency_s=random.choice((1e-5, 1e-4, 1e-2)),
            bandwidth_bytes_per_s=random.choice((1e8, 1e9, 1e10)),
            source="random",
        )
        for one in names
        for other in names
        if one < other and random.random() < 0.5
    }
    workload = Workload(
        context=random.choice((256, 4096)),
        concurrency=random.choice((1, 2, 5)),
        prompt_tokens=random.choice((1, 200, 1000)),
        new_tokens=random.choice((1, 2, 500)),
        prefill_chunk=random.choice((64, 512)),
        reserve_bytes=0,
        server_bytes=random.choice((0, 100_000_000)),
        ends_everywhere=random.random() < 0.2,
    )
    machines_and_links = Cluster(machines=cluster.machines, links=links)
    if streaming:
        disks = [Value(number=number, source="random", status="set") for number in (1e9, 3e9, 7e9)]
        able = tuple(replace(m, ssd=random.choice([None, *disks])) for m in cluster.machines)
        return Question(
            model=model,
            cluster=Cluster(machines=able, links=links),
            workload=replace(workload, ends_everywhere=False),
            objective=objective,
            streaming=Streaming(curve=default_curve()),
        )
    return Question(model=model, cluster=machines_and_links, workload=workload, objective=objective)


def _random_machine(random: Random, index: int, total_bytes: int) -> Machine:
    def value(number: float) -> Value:
        return Value(number=number, source="random", status="set")

    return Machine(
        name=f"machine{index}",
        chip="random",
        memory_bytes=random.choice((64, 128, 256)) * GIB,
        limit=value(round(total_bytes * random.uniform(0.1, 1.2)) + 900_000_000),
        bandwidth=value(random.choice((100e9, 400e9, 800e9))),
        prefill=value(random.choice((1e12, 1e13))),
        overhead=value(random.choice((0.0, 1e-4, 1e-3))),
    )
