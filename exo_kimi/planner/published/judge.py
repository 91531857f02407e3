"""The laws against published measurements: `exo-kimi bench plan --published`.

A measurement was used to fit a constant, or it judges the laws; it is never both. Constants live where they are used (the M3
Ultra's profile, links.toml, `search.tensor`), and a test fits them again from the measurements that are marked so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.planner import data
from exo_kimi.planner.machines.cluster import Cluster, link_of_kind, read_cluster
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit, tpot_s, ttft_s
from exo_kimi.planner.search.tensor import tensor_decode_s
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.catalog import published_model, read_model
from exo_kimi.planner.weights.recipes import Recipe, load_recipe, parse_recipe
from exo_kimi.planner.workload import Workload

Kind = Literal["decode", "prefill", "pipeline", "tensor"]
Use = Literal["fit", "held-out", "not judged"]
FOLDER = "published"
SHORT_TOKENS, LONG_TOKENS = 8_192, 16_384  # up to the one is a short context, from the other on a long one


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One published figure.

    Args:
        series: what was measured, with which program.
        kind: decode and pipeline: one sequence over layers one after another; prefill: a prompt; tensor: every layer on all.
        use: what it is for here.
        tokens: of the prompt for prefill, else cached ones.
        tokens_per_s: as published, or the prompt over the published seconds.
        question: the model and the machines.
        split: layers of each machine.
        first_request_s: what a server's first request waits beside its own work.
        fits: the constant that was fitted to it, empty for others.
        note: why it is not judged, empty for others.
        source: where it is published.
    """

    series: str
    kind: Kind
    use: Use
    tokens: int
    tokens_per_s: float
    question: Question
    split: tuple[int, ...]
    first_request_s: float
    fits: str
    note: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A measurement with what the laws say: predicted tokens/s over measured ones, less one."""

    measurement: Measurement
    tokens_per_s: float

    @property
    def error(self) -> float:
        """Above zero where more is promised than was measured."""
        return self.tokens_per_s / self.measurement.tokens_per_s - 1


def measurements() -> tuple[Measurement, ...]:
    """Every published measurement, in the file's order."""
    table = data.load(FOLDER, "measurements")
    recipes = {entry["name"]: parse_recipe(entry, where="measurements.toml") for entry in table["recipe"]}
    wiring_bytes_per_s = table["wiring"]["bytes_per_s"]
    return tuple(each for entry in table["series"] for each in _series(entry, recipes, wiring_bytes_per_s))


def judge(measured: Sequence[Measurement] | None = None) -> tuple[Judged, ...]:
    """What the laws say of measurements; of all of them when none are given."""
    measured = measurements() if measured is None else measured
    return tuple(Judged(measurement=each, tokens_per_s=predicted_tokens_per_s(each)) for each in measured)


def predicted_tokens_per_s(measurement: Measurement) -> float:
    """What the laws promise for a measurement's model, machines and tokens."""
    question = measurement.question
    if measurement.kind == "tensor":
        return 1 / tensor_decode_s(question.model, question.machines, cached_tokens=measurement.tokens)
    split = PlacedSplit.given(question, measurement.split, question.machines)
    if measurement.kind == "prefill":
        return measurement.tokens / (ttft_s(split) + measurement.first_request_s)
    return 1 / tpot_s(split, cached_tokens=measurement.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Held-out measurements of one kind: how many, the median of their errors' sizes, and the greatest."""

    name: str
    count: int
    median: float
    worst: float


def groups(judged: Sequence[Judged]) -> tuple[Group, ...]:
    """The held-out measurements by what they judge."""
    held = [each for each in judged if each.measurement.use == "held-out"]

    def chosen(kind: Kind, low: int = 0, high: int = 1 << 40) -> list[float]:
        return [abs(e.error) for e in held if e.measurement.kind == kind and low <= e.measurement.tokens <= high]

    found = {
        f"decode, one machine, up to {SHORT_TOKENS} tokens": chosen("decode", high=SHORT_TOKENS),
        f"decode, one machine, from {LONG_TOKENS} tokens": chosen("decode", low=LONG_TOKENS),
        "prefill, one machine": chosen("prefill"),
        "decode, pipeline": chosen("pipeline"),
        "decode, tensor parallel": chosen("tensor"),
    }
    return tuple(
        Group(name=name, count=len(errors), median=statistics.median(errors), worst=max(errors))
        for name, errors in found.items()
        if errors
    )


def judged_text(judged: Sequence[Judged]) -> str:
    """A table of all measurements, and the medians of those that were not fitted to."""
    lines = [f"{'measurement':<52} {'tokens':>7} {'measured':>9} {'predicted':>9} {'error':>7}  use"]
    for each in judged:
        m = each.measurement
        use = f"fit: {m.fits}" if m.use == "fit" else f"not judged: {m.note}" if m.use == "not judged" else m.use
        lines.append(
            f"{m.series:<52} {m.tokens:>7} {m.tokens_per_s:>9.2f} {each.tokens_per_s:>9.2f} {each.error:>+7.1%}  {use}"
        )
    lines += ["", f"{'held out':<52} {'points':>7} {'median':>9} {'worst':>9}"]
    lines += [f"{g.name:<52} {g.count:>7} {g.median:>9.1%} {g.worst:>9.1%}" for g in groups(judged)]
    if not any((each.measurement.kind, each.measurement.use) == ("tensor", "held-out") for each in judged):
        lines.append("decode, tensor parallel: no measurement is left to judge with, all were fitted to")
    return "\n".join(lines) + "\n"


def judged_json(judged: Sequence[Judged]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "measurements": [
            {
                "series": each.measurement.series,
                "kind": each.measurement.kind,
                "use": each.measurement.use,
                "tokens": each.measurement.tokens,
                "measured_tokens_per_s": each.measurement.tokens_per_s,
                "predicted_tokens_per_s": each.tokens_per_s,
                "error": each.error,
                "source": each.measurement.source,
            }
            for each in judged
        ],
        "held_out": [{"name": g.name, "count": g.count, "median": g.median, "worst": g.worst} for g in groups(judged)],
    }


def _series(
    entry: Mapping[str, Any], recipes: Mapping[str, Recipe], wiring_bytes_per_s: float
) -> Iterator[Measurement]:
    model = bytes_of_recipe(
        _config(entry["model"]), recipes.get(entry["recipe"]) or load_recipe(entry["recipe"]), name=entry["model"]
    )
    cluster = read_cluster(entry["cluster"])
    if "link" in entry:
        cluster = _linked(cluster, entry["link"])
    split = tuple(map(int, str(entry.get("split", model.layers)).split(",")))
    for tokens, value in entry["points"]:
        yield Measurement(
            series=entry["name"],
            kind=entry["what"],
            use=entry["use"],
            tokens=tokens,
            tokens_per_s=tokens / value if entry.get("unit") == "s" else value,
            question=Question(model=model, cluster=cluster, workload=_workload(entry, tokens)),
            split=split,
            first_request_s=_first_request_s(entry, model, wiring_bytes_per_s),
            fits=entry.get("fits", ""),
            note=entry.get("why", ""),
            source=entry["source"],
        )


def _workload(entry: Mapping[str, Any], tokens: int) -> Workload:
    context = max(4096, tokens + 2)
    return Workload(context=context, prompt_tokens=tokens, new_tokens=2, prefill_chunk=entry.get("chunk", 2048))


def _first_request_s(entry: Mapping[str, Any], model: ModelBytes, wiring_bytes_per_s: float) -> float:
    return model.total_bytes / wiring_bytes_per_s if entry.get("first_request") else 0.0


def _config(name: str) -> KimiConfig:
    return read_model(FOLDER, name).config if name in data.names(FOLDER) else published_model(name).config


def _linked(cluster: Cluster, kind: str) -> Cluster:
    names = [machine.name for machine in cluster.machines]
    return replace(
        cluster,
        links={frozenset((one, other)): link_of_kind(kind) for one in names for other in names if one != other},
    )
