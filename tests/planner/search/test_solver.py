"""The solver against brute force: every order of every subset, every cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from exo_kimi.planner.machines.cluster import make_cluster
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import Placed, PlacedSplit
from exo_kimi.planner.search.search import ORDER_SHARE, best_split, fits
from exo_kimi.planner.search.solver import INFINITE, Goal, Int64s, SplitProblem, solve
from exo_kimi.planner.search.tables import TICKS_PER_S, goal_for, need_table, split_problem
from exo_kimi.planner.workload import OBJECTIVES, Objective
from tests.work import calls_of

Cases = Callable[..., Question]


def every_split(problem: SplitProblem, upward: Int64s | None = None) -> Iterator[tuple[int, int, int]]:
    """(total, peak, boundaries towards more memory) of every feasible split, found by plain recursion."""
    total, peak = problem.total.tolist(), problem.peak.tolist()
    hop_total, hop_peak = problem.hop_total.tolist(), problem.hop_peak.tolist()
    layers, machines = problem.layers, range(problem.machines)
    ups = np.zeros_like(problem.hop_total).tolist() if upward is None else upward.tolist()

    def extend(start: int, used: tuple[int, ...], cost: int, worst: int, up: int) -> Iterator[tuple[int, int, int]]:
        if start == layers:
            if problem.stages in (0, len(used)):
                yield cost, worst, up
            return
        for machine in machines:
            if machine in used:
                continue
            last = used[-1] if used else machine
            hop, hop_worst = (hop_total[last][machine], hop_peak[last][machine]) if used else (0, 0)
            for end in range(start + 1, layers + 1):
                own = total[machine][start][end]
                if own < INFINITE:
                    now = max(worst, hop_worst, peak[machine][start][end])
                    yield from extend(end, (*used, machine), cost + hop + own, now, up + ups[last][machine])

    return extend(0, (), 0, 0, 0)


def random_problem(random: Random) -> SplitProblem:
    """Any tables at all, without the order that real costs have."""
    layers, machines = random.randint(1, 12), random.choice((1, 2, 2, 3, 3, 3, 4))
    if random.random() < 0.02:
        layers, machines = 12, 5
    generator = np.random.default_rng(random.randrange(1 << 30))
    shape = (machines, layers + 1, layers + 1)
    proper = np.arange(layers + 1)[:, None] < np.arange(layers + 1)[None, :]
    allowed = proper & (generator.random(shape) < random.choice((0.3, 0.8, 1.0)))
    return SplitProblem(
        total=np.where(allowed, generator.integers(0, random.choice((3, 10_000)), shape), INFINITE),
        peak=generator.integers(0, random.choice((3, 10_000)), shape),
        hop_total=generator.integers(0, random.choice((1, 1000)), (machines, machines)),
        hop_peak=generator.integers(0, random.choice((1, 1000)), (machines, machines)),
        kinds=tuple(range(machines)),
        stages=random.choice((0, 0, 0, 1, 2)) if machines > 1 else 0,
    )


GOALS: Sequence[Goal] = (
    lambda total, peak: total,
    lambda total, peak: total + 7 * peak,
    lambda total, peak: max(2 * peak, total),
    lambda total, peak: peak,
)


def test_any_tables_are_solved_as_brute_force_solves_them() -> None:
    random = Random(0)
    infeasible = 0
    for _ in range(1200):
        problem = random_problem(random)
        pairs = {split[:2] for split in every_split(problem)}
        infeasible += not pairs
        for goal in GOALS:
            found = solve(problem, goal)
            assert (found is None) == (not pairs)
            if found is not None:
                assert found.value == goal(found.total, found.peak) == min(goal(*pair) for pair in pairs)
                assert (found.total, found.peak) in pairs
    assert 100 < infeasible < 900


def test_real_costs_are_solved_as_brute_force_solves_them(random_case: Cases) -> None:
    random = Random(1)
    infeasible = 0
    for number in range(900):
        question = random_case(random, OBJECTIVES[number % 4])
        best = best_split(question)
        oracle = brute_force(question)
        infeasible += oracle is None
        assert (best is None) == (oracle is None)
        if best is not None and oracle is not None:
            fastest, preferred = oracle
            stages = best.stages
            assert [stage.start_layer for stage in stages] == [0, *(stage.end_layer for stage in stages[:-1])]
            assert stages[-1].end_layer == question.layers
            # The laws in floats, without any table; the preference for an order costs a thousandth a boundary at most.
            rounding_s = rounding(question)
            assert best.objective_s <= preferred / TICKS_PER_S + rounding_s
            assert best.objective_s >= fastest / TICKS_PER_S - rounding_s
            assert best.objective_s <= fastest / TICKS_PER_S * (1 + len(stages) / 1000) + rounding_s
    assert 100 < infeasible < 800


def rounding(question: Question) -> float:
    """Seconds by which whole ticks may differ from the laws."""
    return 30 * (question.workload.new_tokens + question.workload.chunks) / TICKS_PER_S


def brute_force(question: Question) -> tuple[int, int] | None:
    """The least time in ticks, and the least with the preference for an order."""
    counts = range(1, len(question.machines) + 1) if question.objective == "throughput" else (0,)
    sizes = np.array([machine.memory_bytes for machine in question.machines])
    upward = (sizes[:, None] < sizes[None, :]).astype(np.int64)
    fastest, preferred = [], []
    for count in counts:
        goal = goal_for(question, stages=max(count, 1))
        splits = set(every_split(split_problem(question, stages=count), upward))
        share = min((total for total, _, _ in splits), default=0) // ORDER_SHARE
        fastest += [goal(total, peak) for total, peak, _ in splits]
        preferred += [goal(total + up * share, peak) for total, peak, up in splits]
    return (min(fastest), min(preferred)) if fastest else None


def test_tables_hold_what_the_laws_say(random_case: Cases) -> None:
    random = Random(2)
    for number in range(200):
        question = random_case(random, OBJECTIVES[number % 4])
        machines = random.sample(question.machines, random.randint(1, min(len(question.machines), question.layers)))
        cuts = [0, *sorted(random.sample(range(1, question.layers), len(machines) - 1)), question.layers]
        stages = [
            Placed(machine=machine, start_layer=start, end_layer=end)
            for machine, start, end in zip(machines, cuts, cuts[1:], strict=False)
        ]
        problem = split_problem(question, stages=len(stages))
        need = need_table(question)
        for s in stages:
            assert need[s.start_layer, s.end_layer] == question.need(s.start_layer, s.end_layer).total_bytes
        order = [question.machines.index(machine) for machine in machines]
        if any(need[s.start_layer, s.end_layer] > s.machine.limit_bytes for s in stages):
            continue
        total = sum(int(problem.total[i, a, b]) for i, a, b in zip(order, cuts, cuts[1:], strict=False))
        peaks = [int(problem.peak[i, a, b]) for i, a, b in zip(order, cuts, cuts[1:], strict=False)]
        for one, other in itertools.pairwise(order):
            total += int(problem.hop_total[one, other])
            peaks.append(int(problem.hop_peak[one, other]))
        value = goal_for(question, stages=len(stages))(total, max(peaks))
        split = PlacedSplit(question=question, stages=tuple(stages))
        assert value / TICKS_PER_S == pytest.approx(split.objective_s, abs=rounding(question))


def test_more_memory_never_makes_a_split_worse(random_case: Cases) -> None:
    """But for the preference for an order, which may cost a thousandth a boundary."""
    random = Random(3)
    compared = 0
    for number in range(400):
        question = random_case(random, OBJECTIVES[number % 4])
        before = best_split(question)
        lucky = random.randrange(len(question.machines))
        larger = [
            replace(m, limit=replace(m.limit, number=m.limit.number * 1.3)) if index == lucky else m
            for index, m in enumerate(question.machines)
        ]
        after = best_split(replace(question, cluster=replace(question.cluster, machines=tuple(larger))))
        if before is not None:
            assert after is not None
            assert after.objective_s <= before.objective_s * (1 + len(after.stages) / 1000)
            compared += 1
    assert compared > 100


def test_the_order_of_a_listing_does_not_matter(random_case: Cases) -> None:
    random = Random(4)
    for number in range(200):
        question = random_case(random, OBJECTIVES[number % 4])
        shuffled = list(question.machines)
        random.shuffle(shuffled)
        same = replace(question, cluster=replace(make_cluster(shuffled), links=question.cluster.links))
        assert best_split(same) == best_split(question)


def test_a_machine_that_only_adds_a_hop_is_left_out(ask: Cases) -> None:
    split = best_split(ask("q3+q6", "m3-ultra-512, m2-ultra-192", "latency").with_raised_limits())
    assert split is not None
    assert [stage.machine.name for stage in split.stages] == ["m3-ultra-512"]


def test_fits_agrees_with_the_search(random_case: Cases) -> None:
    random = Random(5)
    for _ in range(200):
        question = random_case(random, "ttft")
        assert fits(question) == (best_split(question) is not None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_different_machines_are_little_work(ask: Cases, objective: Objective) -> None:
    eight = "m3-ultra-256, m2-ultra-192, m4-max-128, m5-max-128, m1-ultra-128, m3-max-128, m2-max-96, m1-max-64"
    question = ask("q34+q6", eight, objective, concurrency=8)
    split, calls = calls_of(lambda: best_split(question))
    assert split is not None
    assert calls < 300_000  # up to 153,000


@pytest.mark.parametrize("stages", [2, 8, 61])
def test_equal_machines_take_no_longer_than_their_number_asks(stages: int) -> None:
    """Sets that differ only by swapping equal machines are one: 2^61 would never end."""
    ends = np.arange(62)
    size = np.where(ends[:, None] < ends[None, :], ends[None, :] - ends[:, None], INFINITE)
    nothing = np.zeros((stages, stages), np.int64)
    tables = np.stack([size] * stages)
    problem = SplitProblem(
        total=tables, peak=tables, hop_total=nothing, hop_peak=nothing, kinds=(0,) * stages, stages=stages
    )
    found = solve(problem, lambda total, peak: peak)
    assert found is not None
    assert (found.peak, found.order) == (-(-61 // stages), tuple(range(stages)))
