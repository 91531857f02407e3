"""`/v1/plan`: the planner behind the page, for published models on machines by name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo_kimi.errors import ExoKimiError, RequestError
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.machines.hardware import chip_memories, chip_names
from exo_kimi.planner.streaming import parse_curve
from exo_kimi.planner.weights.catalog import model_names
from exo_kimi.planner.weights.recipes import recipe_names
from exo_kimi.planner.workload import OBJECTIVES, Objective
from exo_kimi.units import format_seconds

MOST_TOKENS = 2**24  # beyond any context; numbers in the bounds of what can be computed with
MOST_HITS = 2**16  # characters
HITS_NAME = "hits.toml"
TokenNumber = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class PlanRequest(BaseModel):
    """The body of `POST /v1/plan`, as the options of `exo-kimi plan`.

    Args:
        cluster: machines such as `m3-ultra-512, m2-ultra-192`; never a file of the server's.
        recipe: by name; as published when left out.
        split: layers of each machine, the largest first; the best when left out.
        stream: where layers do not fit, read experts from disk.
        ssd_bytes_per_s: of the machines' disks; as published of the chip when left out.
        hits: the text of a file of hit rates, as `exo-kimi trace replay -o` writes it; as published when left out.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    cluster: Annotated[str, Field(min_length=1, max_length=400)]
    model: Annotated[str, Field(max_length=100)]
    recipe: Annotated[str, Field(max_length=100)] | None = None
    context: TokenNumber | None = None
    concurrency: Annotated[int, Field(ge=1, le=4096)] | None = None
    objective: Objective = "request"
    prompt_tokens: TokenNumber | None = None
    new_tokens: TokenNumber | None = None
    kv_bits: Annotated[int, Field(ge=8, le=8)] | None = None
    raise_limits: bool = False
    split: Annotated[str, Field(max_length=100)] | None = None
    stream: bool = False
    ssd_bytes_per_s: Annotated[float, Field(ge=1e6, le=1e12)] | None = None
    hits: Annotated[str, Field(max_length=MOST_HITS)] | None = None


class PlanAnswer(BaseModel):
    """A plan and how it reads.

    Args:
        summary: in one line.
        plan: as `exo-kimi plan -o` writes it.
        plan_json: the same as the text of its file.
        svg: its picture.
        text: for a terminal, with the explanation.
        command: that makes the same plan.
    """

    summary: str
    plan: dict[str, Any]
    plan_json: str
    svg: str
    text: str
    command: str


class MachineChoice(BaseModel):
    """A chip by its name in a cluster, and the memories that it was sold with."""

    name: str
    memory_gib: list[int]


class PlanChoices(BaseModel):
    """What `POST /v1/plan` knows."""

    machines: list[MachineChoice]
    models: list[str]
    recipes: list[str]
    objectives: list[str]


def parse_plan(body: dict[str, Any]) -> PlanRequest:
    """A request for a plan.

    Raises:
        RequestError: with the field that is wrong.
    """
    try:
        asked = PlanRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"invalid '{name}': {first['msg']}", param=name) from None
    for name, text in (("cluster", asked.cluster), ("recipe", asked.recipe or "")):
        if text.endswith(".toml") or "/" in text:
            raise RequestError(
                f"'{name}' names a file, which a server does not read for its clients",
                expected="machines or a recipe by name",
                fix="use `exo-kimi plan` where the file is",
                param=name,
            )
    return asked


def make_plan(asked: PlanRequest) -> PlanAnswer:
    """The best plan, or the one that was asked for. Takes a second at most.

    Raises:
        RequestError: nothing fits, or something is not known; with the planner's words.
    """
    try:
        hits = None if asked.hits is None else parse_curve(asked.hits, HITS_NAME)
        answer = plan_answer(**asked.model_dump(exclude={"hits"}), hits=hits, explained=True)
    except ExoKimiError as error:
        raise RequestError(str(error), param=None, code="plan_infeasible") from None
    plan, made, text = answer.plan, answer.plan.prediction, answer.plan.to_json()
    return PlanAnswer(
        summary=(
            f"{plan.model.name} {plan.model.source}: "
            + ", ".join(f"{stage.machine} {stage.start_layer}:{stage.end_layer}" for stage in plan.stages)
            + f"; {made.decode_tokens_per_s:.1f} tokens/s, first token after {format_seconds(made.ttft_s)}"
        ),
        plan=json.loads(text),
        plan_json=text,
        svg=answer.svg,
        text=answer.text,
        command=_command(asked),
    )


def plan_choices() -> PlanChoices:
    """Machines, models, recipes and objectives by name."""
    return PlanChoices(
        machines=[MachineChoice(name=name, memory_gib=list(chip_memories(name))) for name in chip_names()],
        models=list(model_names()),
        recipes=[*recipe_names(), *(f"uniform-{bits}" for bits in (3, 4, 6, 8))],
        objectives=list(OBJECTIVES),
    )


def _command(asked: PlanRequest) -> str:
    words = ["exo-kimi plan", f"--model {asked.model}", f"--cluster '{asked.cluster}'"]
    for name in ("recipe", "context", "concurrency", "objective", "prompt_tokens", "new_tokens", "kv_bits", "split"):
        value = getattr(asked, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    if asked.ssd_bytes_per_s is not None:
        words.append(f"--ssd {asked.ssd_bytes_per_s / 1e9:g}GB/s")
    words += [f"--hits {HITS_NAME}"] if asked.hits is not None else []
    words += ["--raise-limits"] if asked.raise_limits else []
    words += ["--stream"] if asked.stream else []
    return " ".join([*words, "--explain", "-o plan.json"])
