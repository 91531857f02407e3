"""`--explain`: why this split, what binds, and what a change would bring, in words; it computes nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.search import compare
from exo_kimi.planner.search.advice import largest_context, limit_lines
from exo_kimi.planner.search.compare import Choice
from exo_kimi.planner.search.cost import Placed, Prediction, predict
from exo_kimi.planner.search.search import best_split
from exo_kimi.planner.search.tensor import tensor_options
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import Objective, Workload
from exo_kimi.units import format_bytes, format_gb

# What is faster by less than this is not called faster.
NOTICEABLE = 0.005


def explain(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> str:
    """The whole explanation of the best plan; the cluster must be able to hold the model."""
    stages = best_split(model, cluster, workload, objective)
    if stages is None:
        raise ValueError("nothing to explain: make_plan says what is short")
    own = predict(model, cluster, stages, workload)
    sections = (
        ("Why this split", _why(model, cluster, workload, objective, stages, own)),
        ("Other objectives", _objectives(model, cluster, workload, objective, own)),
        ("More machines or fewer", _machines(model, cluster, workload, objective, stages, own)),
        ("Other limits and contexts", _limits(model, cluster, workload, objective, own)),
        ("Other recipes", _recipes(model, cluster, workload, objective)),
        ("Tensor parallel", _tensor(model, cluster, workload, own)),
        ("Not known", _unknown(stages)),
    )
    blocks = []
    for title, lines in sections:
        body = [f"  {line}" for line in lines]
        if body:
            blocks.append("\n".join([title, *body]))
    return "\n\n".join(blocks) + "\n"


def _why(
    model: ModelBytes,
    cluster: Cluster,
    workload: Workload,
    objective: Objective,
    stages: Sequence[Placed],
    own: Prediction,
) -> Iterator[str]:
    goal = {
        "request": f"one request of {workload.prompt_tokens} tokens in and {workload.new_tokens} out takes {own.request_s:.1f} s",
        "latency": f"one sequence decodes at {own.decode_tokens_per_s:.2f} tokens/s",
        "throughput": f"{workload.concurrency} sequences together get {own.throughput_tokens_per_s:.1f} tokens/s",
        "ttft": f"the first token of {workload.prompt_tokens} comes after {own.ttft_s:.1f} s",
    }[objective]
    yield f"{objective}: {goal}, the best of every order, subset and cut."
    for table in compare.neighbours(model, cluster, workload, objective, stages):
        chosen = tuple(stage.end_layer - stage.start_layer for stage in stages)
        own_s = next(row.seconds for row in table if row.counts == chosen)
        for row in table:
            split = ",".join(map(str, row.counts))
            if row.missing_bytes:
                result = "cannot be: " + ", ".join(
                    f"{name} is short by {format_bytes(b)}" for name, b in row.missing_bytes
                )
            else:
                result = f"{_time(row.seconds)}" + (
                    "" if row.counts == chosen else f"   {row.seconds / own_s - 1:+.2%}"
                )
            yield f"{'>' if row.counts == chosen else ' '} {split:<12} {result}"


def _objectives(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, own: Prediction
) -> Iterator[str]:
    for choice in compare.objectives(model, cluster, workload):
        if choice.stages is None or choice.prediction is None:
            continue
        gain = choice.prediction.decode_tokens_per_s / own.decode_tokens_per_s - 1
        note = ""
        if choice.label == "latency" and objective != "latency":
            note = f"   {gain:+.2%} decode" + (", hardly a gain" if gain < NOTICEABLE * 2 else "")
        elif choice.label == "throughput":
            sequences = max(workload.concurrency, len(cluster.machines))
            note = f"   {choice.prediction.throughput_tokens_per_s:.2f} tokens/s for {sequences} sequences at once"
        yield f"{choice.label:<11} {_shape(choice.stages):<44} {_numbers(choice.prediction)}{note}"


def _machines(
    model: ModelBytes,
    cluster: Cluster,
    workload: Workload,
    objective: Objective,
    stages: Sequence[Placed],
    own: Prediction,
) -> Iterator[str]:
    used = {stage.machine.name for stage in stages}
    left = [machine.name for machine in cluster.machines if machine.name not in used]
    if left:
        yield f"left out: {', '.join(left)}; no split that uses it is better."
    if len(cluster.machines) > 1:
        yield from _second_machine(model, cluster, workload, objective, stages, own)
    for choice in compare.without_each(model, cluster, workload, objective, stages) if len(stages) > 1 else ():
        yield f"without {choice.label}: {_outcome(choice)}"
    for choice in compare.one_more(model, cluster, workload, objective):
        yield f"with one {choice.label} more: {_outcome(choice)}"
        faster = choice.prediction.decode_tokens_per_s / own.decode_tokens_per_s - 1 if choice.prediction else 0.0
        if faster < NOTICEABLE:
            yield "  it would not make decoding faster: layers run one after another, a machine adds memory and prefill."


def _second_machine(
    model: ModelBytes,
    cluster: Cluster,
    workload: Workload,
    objective: Objective,
    stages: Sequence[Placed],
    own: Prediction,
) -> Iterator[str]:
    single = compare.alone(model, cluster, workload, objective)
    if single is None or single.stages is None or single.prediction is None:
        yield "no machine holds the model alone, not even with its wired limit raised."
        return
    lines = limit_lines(model, workload, single.stages)
    after = " once its wired limit is raised" if lines else ""
    one, more = single.prediction, own
    if len(stages) == 1:
        yield f"A second machine does not make it faster: {single.label} holds the model alone{after}."
    elif more.decode_tokens_per_s < one.decode_tokens_per_s * (1 + NOTICEABLE):
        yield (
            f"A second machine does not make decoding faster: {single.label} alone{after} decodes "
            f"{one.decode_tokens_per_s:.2f} tokens/s, this plan {more.decode_tokens_per_s:.2f}."
        )
        if more.ttft_s < one.ttft_s * (1 - NOTICEABLE):
            yield (
                f"It shares the prefill: the first token comes after {more.ttft_s:.1f} s instead of {one.ttft_s:.1f} s, "
                f"the request after {more.request_s:.1f} s instead of {one.request_s:.1f} s."
            )
    yield from (f"  {line}" for line in lines)


def _limits(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, own: Prediction
) -> Iterator[str]:
    yield f"the longest context that fits these machines is {largest_context(model, cluster, workload)} tokens."
    raised = compare.choose("raised", model, cluster.with_raised_limits(), workload, objective)
    if raised.stages is None or raised.prediction is None or any(m.limit_before_bytes for m in cluster.machines):
        return
    yield f"with every wired limit raised: {_outcome(raised)}"
    yield from (f"  {line}" for line in limit_lines(model, workload, raised.stages))


def _recipes(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> Iterator[str]:
    for choice in compare.recipes(model, cluster, workload, objective):
        yield f"{choice.label:<11} {_outcome(choice)}"


def _tensor(model: ModelBytes, cluster: Cluster, workload: Workload, own: Prediction) -> Iterator[str]:
    options = tensor_options(model, cluster, workload)
    if not options:
        yield "not possible: it needs 2, 4 or 8 machines with RDMA and nearly equal memory, each with room for its slice."
    for option in options:
        speed = 1 / option.tpot_s
        wins = speed > own.decode_tokens_per_s * (1 + NOTICEABLE)
        verdict = "recommended for decode" if wins else "not faster than this plan"
        yield (
            f"over {len(option.machines)} ({', '.join(option.machines)}): {speed:.1f} tokens/s, "
            f"{format_gb(option.bytes_each)} on each: {verdict}; exo runs it, exo-kimi does not."
        )


def _unknown(stages: Sequence[Placed]) -> Iterator[str]:
    for stage in stages:
        for text in stage.machine.unknown:
            yield f"{stage.machine.name}: {text}"
    if any(stage.machine.unknown for stage in stages):
        yield "`exo-kimi machine --measure -o FILE` on the machine replaces what is assumed."


def _outcome(choice: Choice) -> str:
    if choice.stages is None or choice.prediction is None:
        return "does not fit"
    return f"{_shape(choice.stages)}   {_numbers(choice.prediction)}"


def _shape(stages: Sequence[Placed]) -> str:
    return " + ".join(f"{stage.end_layer - stage.start_layer} {stage.machine.name}" for stage in stages)


def _numbers(prediction: Prediction) -> str:
    return (
        f"{prediction.decode_tokens_per_s:5.2f} tokens/s, first token {prediction.ttft_s:.1f} s, "
        f"request {prediction.request_s:.1f} s"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
