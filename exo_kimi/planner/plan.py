"""The plan and its file: JSON, sorted, versioned, with hashes of what it was made from.

Layer ranges are half-open. The same inputs give the same bytes, and a file read and written again is the same file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.errors import PlanError, PlanInfeasibleError
from exo_kimi.planner.workload import OBJECTIVES, Workload
from exo_kimi.units import format_bytes

VERSION = 4
LINKS = ("zmq", "jaccl")
T = TypeVar("T")
Engine = Literal["exo", "exo-kimi"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanModel:
    """The model a plan is for. `hash` is the checkpoint's fingerprint when `from_headers`; `kv_bits` None is a bf16 cache."""

    name: str
    source: str
    hash: str
    from_headers: bool
    layers: int
    hidden_size: int
    total_bytes: int
    kv_bits: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStage:
    """One stage.

    Args:
        machine, chip: whose.
        start_layer, end_layer: half-open.
        memory_bytes, limit_bytes, limit_source: of the machine.
        weight_bytes: all that it holds; without the routed experts where these are streamed.
        kv_bytes, scratch_bytes, reserve_bytes, server_bytes: beside them.
        headroom_bytes: what the limit leaves.
        wired_limit_mb: what `iogpu.wired_limit_mb` must be set to first, None where the default is enough.
        expert_slots: of each layer, where experts are read from disk; None where all are held.
        expert_cache_bytes: of these slots over all its layers, as `serve --expert-cache` takes them; 0 where all are held.
    """

    machine: str
    chip: str
    start_layer: int
    end_layer: int
    memory_bytes: int
    limit_bytes: int
    limit_source: str
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    reserve_bytes: int
    server_bytes: int
    headroom_bytes: int
    wired_limit_mb: int | None
    expert_slots: int | None = None
    expert_cache_bytes: int = 0

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return self.end_layer - self.start_layer

    @property
    def need_bytes(self) -> int:
        """All that it holds: weights, slots of experts, KV, scratch, reserve, and the server on stage 0."""
        weight_bytes = self.weight_bytes + self.expert_cache_bytes
        return weight_bytes + self.kv_bytes + self.scratch_bytes + self.reserve_bytes + self.server_bytes

    @property
    def sysctl(self) -> str | None:
        """The command that raises the wired limit, until the next restart."""
        return None if self.wired_limit_mb is None else f"sudo sysctl iogpu.wired_limit_mb={self.wired_limit_mb}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPrediction:
    """Seconds and tokens per second, rounded to six digits; see `search.cost.Prediction`.

    Args:
        decode_tokens_per_s: of one sequence, in the middle of the timed request.
        slow_tokens_per_s, fast_tokens_per_s: the ends of its band, where experts are read from disk; else the same.
        first_tokens_per_s: of the same at the start of the context.
        last_tokens_per_s: at its end.
        tpot_s, ttft_s, request_s: of the timed request.
        throughput_tokens_per_s: of all sequences together.
    """

    decode_tokens_per_s: float
    slow_tokens_per_s: float
    fast_tokens_per_s: float
    first_tokens_per_s: float
    last_tokens_per_s: float
    tpot_s: float
    ttft_s: float
    request_s: float
    throughput_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A split of a model over machines, what it takes and what it promises.

    Args:
        version: of this format.
        model: what is split.
        cluster_hash: of machines and links.
        workload: what it was made for.
        objective: what it minimises.
        stages: first layers first.
        link: how hidden states go between machines: `jaccl` where every link it was priced with is RDMA, else `zmq`.
        left_out: machines that the split is better without.
        prediction: by the laws of `planner.search.cost`.
        assumptions: values that nobody has published or measured, as `machine: what`.
    """

    version: int
    model: PlanModel
    cluster_hash: str
    workload: Workload
    objective: str
    stages: tuple[PlanStage, ...]
    link: str
    left_out: tuple[str, ...]
    prediction: PlanPrediction
    assumptions: tuple[str, ...]

    @property
    def engine(self) -> Engine:
        """The engine whose bytes it counts: exo's own, which holds embedding and head on every stage, or ours."""
        return "exo" if self.workload.ends_everywhere else "exo-kimi"

    @property
    def streams(self) -> bool:
        """Whether any stage reads experts from disk."""
        return any(stage.expert_slots is not None for stage in self.stages)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open layer ranges, one per stage."""
        return tuple((stage.start_layer, stage.end_layer) for stage in self.stages)

    @property
    def split(self) -> str:
        """`44,17`, as `serve --split` takes it."""
        return ",".join(str(stage.layers) for stage in self.stages)

    def to_json(self) -> str:
        """The file's text; keys are sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: object = "plan") -> Plan:
        """A plan from its file's text, every field checked.

        Raises:
            PlanError: not a plan, of another version, or one that does not place every layer once.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError("a plan is JSON", found=error, where=where) from None
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise PlanError("a plan of another version", expected=VERSION, found=version, where=where, fix="plan again")
        plan = cls(
            **{
                **_checked(cls, raw, where),
                "model": _build(PlanModel, raw.get("model"), where),
                "workload": _build(Workload, raw.get("workload"), where),
                "stages": tuple(_build(PlanStage, stage, where) for stage in _list(raw, "stages", where)),
                "prediction": _build(PlanPrediction, raw.get("prediction"), where),
                "left_out": tuple(map(str, _list(raw, "left_out", where))),
                "assumptions": tuple(map(str, _list(raw, "assumptions", where))),
            }
        )
        _check_layers(plan, where)
        return plan

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def read_plan(path: str | Path) -> Plan:
    """A plan from its file.

    Raises:
        PlanError: it cannot be read or is not a plan.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise PlanError("cannot read the plan", found=error, where=path) from None
    return Plan.from_json(text, where=path)


def check_headroom(plan: Plan, *, force: bool = False, where: object = None) -> None:
    """Refuse a plan that asks more of a machine than its limit, as a split that was given can.

    Args:
        plan: a search never makes such a one.
        force: take it all the same.
        where: the plan's file or the option that gave the split, for the message.

    Raises:
        PlanInfeasibleError: with every machine that is short, and by how much.
    """
    short = {stage.machine: -stage.headroom_bytes for stage in plan.stages if stage.headroom_bytes < 0}
    if force or not short:
        return
    lines = [
        f"{stage.machine} (layers {stage.start_layer}:{stage.end_layer}) needs {format_bytes(stage.need_bytes)} and has "
        f"a limit of {format_bytes(stage.limit_bytes)}: short by {format_bytes(-stage.headroom_bytes)} "
        f"({-stage.headroom_bytes} bytes)"
        for stage in plan.stages
        if stage.headroom_bytes < 0
    ]
    raise PlanInfeasibleError(
        f"the split {plan.split} does not fit with a context of {plan.workload.context} tokens:\n  "
        + "\n  ".join(lines),
        short=short,
        changes=(),
        where=where,
        fix="plan without --split, which finds what fits, or give --force to take this one all the same",
    )


def _checked(cls: type, raw: object, where: object) -> dict[str, Any]:
    known = {field.name for field in fields(cls)}
    found = set(raw) if isinstance(raw, dict) else set()
    if not isinstance(raw, dict) or known != found:
        difference = ", ".join(sorted(known ^ found)) or "no object"
        raise PlanError(
            f"a {cls.__name__} with wrong keys", expected=", ".join(sorted(known)), found=difference, where=where
        )
    for field in fields(cls):
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
        kind = kinds.get(str(field.type).removesuffix(" | None"))
        value = raw[field.name]
        if kind is None or (value is None and str(field.type).endswith("None")):
            continue
        if not isinstance(value, kind) or (kind[0] is not bool and isinstance(value, bool)):
            raise PlanError(f"{field.name} has the wrong type", expected=field.type, found=repr(value), where=where)
    return raw


def _build(cls: type[T], raw: object, where: object) -> T:
    return cls(**_checked(cls, raw, where))


def _list(raw: dict[str, Any], key: str, where: object) -> list[Any]:
    if not isinstance(raw.get(key), list):
        raise PlanError(f"{key} is not a list", found=repr(raw.get(key))[:60], where=where)
    return list(raw[key])


def _check_layers(plan: Plan, where: object) -> None:
    ends = [0, *(stage.end_layer for stage in plan.stages)]
    starts = [*(stage.start_layer for stage in plan.stages), plan.model.layers]
    if ends != starts or any(stage.layers < 1 for stage in plan.stages):
        raise PlanError(
            "a plan that does not place every layer once",
            expected=f"half-open ranges from 0 to {plan.model.layers}, end to start",
            found=", ".join(f"{start}:{end}" for start, end in plan.ranges) or "no stage",
            where=where,
        )
    if plan.link not in LINKS:
        raise PlanError("unknown link", expected=", ".join(LINKS), found=plan.link, where=where)
    if plan.objective not in OBJECTIVES:
        raise PlanError("unknown objective", expected=", ".join(OBJECTIVES), found=plan.objective, where=where)
