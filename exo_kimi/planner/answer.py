"""From a question to its answer: a split as a plan with its texts, or what the machines are short of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner import data
from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.plan import VERSION, Plan, PlanModel, PlanPrediction, PlanStage, check_headroom
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.advice import changes_that_fit
from exo_kimi.planner.search.cost import Placed, PlacedSplit
from exo_kimi.planner.search.fit import FitCandidate, best_fit
from exo_kimi.planner.search.search import best_split, least_shortage
from exo_kimi.planner.show.draft import draft_text
from exo_kimi.planner.show.explain import explain
from exo_kimi.planner.show.picture import terminal
from exo_kimi.planner.show.svg import svg
from exo_kimi.planner.weights.measured import MeasuredModel
from exo_kimi.units import GIB, format_bytes, format_gb

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a question: a split, the plan of it, and how both read.

    Args:
        split: machines with their layers, and the question.
        plan: for a file.
        explained: whether `text` says why.
        measured: smaller forms of the model, for the explanation.
        considered: what `--fit` chose from.
    """

    split: PlacedSplit
    plan: Plan
    explained: bool = False
    measured: tuple[MeasuredModel, ...] = ()
    considered: tuple[FitCandidate, ...] = ()

    @classmethod
    def of(cls, split: PlacedSplit, *, explained: bool = False) -> Answer:
        """A split as an answer, whether it was found or given; given, it may be over a limit."""
        return cls(split=split, plan=plan_of(split), explained=explained)

    @classmethod
    def given(
        cls, question: Question, split: str | Sequence[int], *, force: bool = False, called: str = "machines"
    ) -> Answer:
        """Layer counts over the question's machines, in the order asked for, else the largest first.

        Args:
            question: what the split is for.
            split: layers of each, as text or as numbers.
            force: take it even where a machine is over its limit.
            called: what an error calls the machines.

        Raises:
            SplitError: they do not place every layer once, or there are more of them than machines.
            PlanInfeasibleError: a machine is over its limit.
        """
        made = cls.of(PlacedSplit.given(question, split, question.machines_in_order, called=called))
        check_headroom(made.plan, force=force, where="--split")
        return made

    @property
    def text(self) -> str:
        """The plan for a terminal, with the explanation when it was asked for."""
        parts = [terminal(self.plan)]
        if self.considered:
            parts.append("\n".join(["Best quality that fits", *(f"  {each.line}" for each in self.considered), ""]))
        if self.split.question.draft is not None:
            parts.append(draft_text(self.split))
        if self.explained:
            parts.append(explain(self.split, self.measured))
        return "\n".join(parts)

    @property
    def svg(self) -> str:
        """The plan as an SVG document."""
        return svg(self.plan)


def fitting(question: Question, measured: Sequence[MeasuredModel], *, explained: bool = False) -> Answer:
    """The best form of the model that fits, as a plan.

    Args:
        question: of the model as it is.
        measured: smaller forms of it, with what they cost.
        explained: whether the text says why.

    Raises:
        PlanInfeasibleError: none fits.
    """
    chosen, candidates = best_fit(question, measured)
    if chosen.split is None:
        raise AssertionError("the best that fits has a split")
    made = Answer.of(chosen.split, explained=explained)
    return replace(made, measured=tuple(measured), considered=candidates)


def answer(question: Question, *, explained: bool = False) -> Answer:
    """The best split, as a plan.

    Raises:
        PlanInfeasibleError: nothing fits; says which machine is short, by how much, and what would make it fit.
    """
    split = best_split(question)
    if split is None:
        raise infeasible(question)
    return Answer.of(split, explained=explained)


def plan_of(split: PlacedSplit) -> Plan:
    """A split with its bytes and promises; over a limit it has negative headroom."""
    question, made = split.question, split.prediction
    model, used = question.model, {stage.machine.name for stage in split.stages}
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
        cluster_hash=cluster_hash(question.cluster),
        workload=question.workload,
        objective=question.objective,
        stages=tuple(_plan_stage(question, stage) for stage in split.stages),
        link=link_of(split),
        left_out=tuple(machine.name for machine in question.machines if machine.name not in used),
        prediction=PlanPrediction(
            decode_tokens_per_s=_digits(made.decode_tokens_per_s),
            slow_tokens_per_s=_digits(split.at("slow").prediction.decode_tokens_per_s),
            fast_tokens_per_s=_digits(split.at("fast").prediction.decode_tokens_per_s),
            first_tokens_per_s=_digits(1 / made.first_tpot_s),
            last_tokens_per_s=_digits(1 / made.last_tpot_s),
            tpot_s=_digits(made.tpot_s),
            ttft_s=_digits(made.ttft_s),
            request_s=_digits(made.request_s),
            throughput_tokens_per_s=_digits(made.throughput_tokens_per_s),
        ),
        assumptions=(
            *(f"{stage.machine.name}: {text}" for stage in split.stages for text in stage.machine.unknown),
            *_link_warnings(split),
            *_disk_assumptions(split),
            *_draft_assumptions(split),
        ),
    )


def link_of(split: PlacedSplit) -> str:
    """`jaccl` when all neighbours are linked by RDMA and both have it, as a cluster.toml says with `kind = "rdma"`.

    A link that is only Thunderbolt was priced as TCP, and stays `zmq`.
    """
    pairs = list(pairwise(stage.machine for stage in split.stages))
    link = split.question.cluster.link
    rdma = all(one.rdma and other.rdma and link(one, other).kind == "rdma" for one, other in pairs)
    return "jaccl" if pairs and rdma else "zmq"


def _link_warnings(split: PlacedSplit) -> Iterator[str]:
    for one, other in pairwise(stage.machine for stage in split.stages):
        warning = split.question.cluster.link(one, other).warning
        if warning:
            yield f"{one.name} to {other.name}: {warning}"


def _disk_assumptions(split: PlacedSplit) -> Iterator[str]:
    streaming = split.question.streaming
    if streaming is None or not split.streams:
        return
    for stage in split.stages:
        ssd = stage.machine.ssd
        if split.slots(stage) is not None and ssd is not None and ssd.status != "measured":
            yield f"{stage.machine.name}: disk, {ssd.number / 1e9:.1f} GB/s: {ssd.source}"
    if not streaming.curve.measured:
        yield f"hit rates: {streaming.curve.source}; a trace replaces them: `exo-kimi trace record`"


def _draft_assumptions(split: PlacedSplit) -> Iterator[str]:
    draft, last = split.question.draft, split.stages[-1]
    if draft is not None:
        size = draft.weights_on(last.start_layer, embedding_bytes=split.question.model.embedding_bytes)
        yield f"draft head {draft.name} on {last.machine.name}, {size} bytes: `serve --draft` holds it; speeds are without it"


def cluster_hash(cluster: Cluster) -> str:
    """Hash of machines and links, as far as they bear on a plan."""
    machines = [asdict(machine) for machine in cluster.machines]
    links = [
        [one.name, other.name, asdict(cluster.link(one, other))]
        for index, one in enumerate(cluster.machines)
        for other in cluster.machines[index + 1 :]
    ]
    return data.digest([machines, links])


def infeasible(question: Question) -> PlanInfeasibleError:
    """The error that says which machine is short and what would make it fit."""
    model, short = question.model, least_shortage(question)
    closest = ", ".join(
        f"{each.machine.name} (layers {each.start_layer}:{each.end_layer}) is short by "
        f"{format_bytes(each.missing_bytes)} ({each.missing_bytes} bytes) of its limit of "
        f"{format_bytes(each.machine.limit_bytes)}"
        for each in short
    )
    names = " and ".join(machine.name for machine in question.machines)
    return PlanInfeasibleError(
        f"{model.name} ({model.source}, {format_gb(model.total_bytes)}) does not fit {names} "
        f"with a context of {question.workload.context} tokens:\n  {closest}",
        short={each.machine.name: each.missing_bytes for each in short},
        changes=changes_that_fit(question),
    )


def _plan_stage(question: Question, stage: Placed) -> PlanStage:
    machine, need = stage.machine, question.held(stage.machine, stage.start_layer, stage.end_layer)
    limit_bytes, source, wired_mb = machine.limit_now_bytes, machine.limit.source, None
    if need.total_bytes > limit_bytes and machine.limit_before_bytes is not None:
        limit_bytes = min(-(-need.total_bytes // GIB) * GIB, machine.limit_bytes)
        wired_mb = limit_bytes // MIB
    elif machine.limit_before_bytes is not None:
        source = "as it is, no sysctl needed"
    return PlanStage(
        machine=machine.name,
        chip=machine.chip,
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        memory_bytes=machine.memory_bytes,
        limit_bytes=limit_bytes,
        limit_source=source,
        headroom_bytes=limit_bytes - need.total_bytes,
        wired_limit_mb=wired_mb,
        **asdict(need),
    )


def _digits(number: float) -> float:
    return float(f"{number:.6g}")
