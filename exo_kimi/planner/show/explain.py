"""`--explain`: why this split, what binds, and what a change would bring, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exo_kimi.planner.search import compare
from exo_kimi.planner.search.advice import largest_context, limit_lines
from exo_kimi.planner.search.compare import Alternative
from exo_kimi.planner.search.cost import PlacedSplit, Prediction
from exo_kimi.planner.search.tensor import tensor_options
from exo_kimi.planner.show.streamed import streamed
from exo_kimi.planner.weights.measured import MeasuredModel
from exo_kimi.units import format_bytes, format_gb

# What is faster by less than this is not called faster.
NOTICEABLE = 0.005


def explain(split: PlacedSplit, measured: Sequence[MeasuredModel] = ()) -> str:
    """The whole explanation of a question's best split, with smaller forms of the model that were measured."""
    sections = (
        ("Why this split", _why(split)),
        ("Experts from disk", streamed(split)),
        ("Other objectives", _objectives(split)),
        ("More machines or fewer", _machines(split)),
        ("Other limits and contexts", _limits(split)),
        ("Other recipes", _recipes(split)),
        ("Smaller forms that were measured", _measured(split, measured)),
        ("Tensor parallel", _tensor(split)),
        ("Not known", _unknown(split)),
    )
    blocks = []
    for title, lines in sections:
        body = [f"  {line}" for line in lines]
        if body:
            blocks.append("\n".join([title, *body]))
    return "\n\n".join(blocks) + "\n"


def _why(split: PlacedSplit) -> Iterator[str]:
    workload, objective, own = split.question.workload, split.question.objective, split.prediction
    goal = {
        "request": f"one request of {workload.prompt_tokens} tokens in and {workload.new_tokens} out takes {own.request_s:.1f} s",
        "latency": f"one sequence decodes at {own.decode_tokens_per_s:.2f} tokens/s",
        "throughput": f"{workload.concurrency} sequences together get {own.throughput_tokens_per_s:.1f} tokens/s",
        "ttft": f"the first token of {workload.prompt_tokens} comes after {own.ttft_s:.1f} s",
    }[objective]
    yield f"{objective}: {goal}, the best of every order, subset and cut."
    for table in compare.neighbours(split):
        own_s = next(row.seconds for row in table if row.counts == split.counts)
        for row in table:
            chosen = row.counts == split.counts
            if row.missing_bytes:
                result = "cannot be: " + ", ".join(
                    f"{name} is short by {format_bytes(b)}" for name, b in row.missing_bytes
                )
            else:
                result = _time(row.seconds) + ("" if chosen else f"   {row.seconds / own_s - 1:+.2%}")
            yield f"{'>' if chosen else ' '} {','.join(map(str, row.counts)):<12} {result}"


def _objectives(split: PlacedSplit) -> Iterator[str]:
    question = split.question
    for other in compare.objectives(question):
        if other.split is None:
            continue
        made = other.split.prediction
        gain = made.decode_tokens_per_s / split.prediction.decode_tokens_per_s - 1
        note = ""
        if other.label == "latency" and question.objective != "latency":
            note = f"   {gain:+.2%} decode" + (", hardly a gain" if gain < NOTICEABLE * 2 else "")
        elif other.label == "throughput":
            sequences = other.split.question.workload.concurrency
            note = f"   {made.throughput_tokens_per_s:.2f} tokens/s for {sequences} sequences at once"
        yield f"{other.label:<11} {_shape(other.split):<44} {_numbers(made)}{note}"


def _machines(split: PlacedSplit) -> Iterator[str]:
    question = split.question
    used = {stage.machine.name for stage in split.stages}
    left = [machine.name for machine in question.machines if machine.name not in used]
    if left:
        yield f"left out: {', '.join(left)}; no split that uses it is better."
    if len(question.machines) > 1 and not split.streams:
        yield from _second_machine(split)
    for other in compare.without_each(split) if len(split.stages) > 1 else ():
        yield f"without {other.label}: {_outcome(other)}"
    own = split.prediction.decode_tokens_per_s
    for other in compare.one_more(question):
        yield f"with one {other.label} more: {_outcome(other)}"
        faster = 0.0 if other.split is None else other.split.prediction.decode_tokens_per_s / own - 1
        if faster < NOTICEABLE:
            yield "  it would not make decoding faster: layers run one after another, a machine adds memory and prefill."


def _second_machine(split: PlacedSplit) -> Iterator[str]:
    single = compare.alone(split.question)
    if single is None or single.split is None:
        yield "no machine holds the model alone, not even with its wired limit raised."
        return
    lines = limit_lines(single.split)
    after = " once its wired limit is raised" if lines else ""
    one, more = single.split.prediction, split.prediction
    if len(split.stages) == 1:
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


def _limits(split: PlacedSplit) -> Iterator[str]:
    question = split.question
    yield f"the longest context that fits these machines is {largest_context(question)} tokens."
    raised = compare.raised_limits(question)
    if raised.split is None or any(machine.limit_before_bytes for machine in question.machines):
        return
    yield f"with every wired limit raised: {_outcome(raised)}"
    yield from (f"  {line}" for line in limit_lines(raised.split))


def _recipes(split: PlacedSplit) -> Iterator[str]:
    for other in compare.recipes(split.question):
        yield f"{other.label:<11} {_outcome(other)}"


def _measured(split: PlacedSplit, measured: Sequence[MeasuredModel]) -> Iterator[str]:
    for each in sorted(measured, key=lambda one: one.kl):
        other = compare.form(split.question, each.name, each.model)
        yield f"{each.name}   {format_gb(each.model.total_bytes)}   {each.cost}"
        yield f"  {_outcome(other)}"


def _tensor(split: PlacedSplit) -> Iterator[str]:
    options = tensor_options(split.question)
    if not options:
        if not split.question.model.config.is_even:
            yield "not possible: exo's own engine, which would run it, builds all layers with as many experts."
            return
        yield "not possible: it needs 2, 4 or 8 machines with RDMA and nearly equal memory, each with room for its slice."
    for option in options:
        speed = 1 / option.tpot_s
        wins = speed > split.prediction.decode_tokens_per_s * (1 + NOTICEABLE)
        verdict = "recommended for decode" if wins else "not faster than this plan"
        yield (
            f"over {len(option.machines)} ({', '.join(option.machines)}): {speed:.1f} tokens/s, "
            f"{format_gb(option.bytes_each)} on each: {verdict}; exo runs it, exo-kimi does not."
        )


def _unknown(split: PlacedSplit) -> Iterator[str]:
    for stage in split.stages:
        for text in stage.machine.unknown:
            yield f"{stage.machine.name}: {text}"
    if any(stage.machine.unknown for stage in split.stages):
        yield "`exo-kimi machine --measure -o FILE` on the machine replaces what is assumed."


def _outcome(other: Alternative) -> str:
    if other.split is None:
        return "does not fit"
    return f"{_shape(other.split)}   {_numbers(other.split.prediction)}"


def _shape(split: PlacedSplit) -> str:
    return " + ".join(f"{stage.layers} {stage.machine.name}" for stage in split.stages)


def _numbers(prediction: Prediction) -> str:
    return (
        f"{prediction.decode_tokens_per_s:5.2f} tokens/s, first token {prediction.ttft_s:.1f} s, "
        f"request {prediction.request_s:.1f} s"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
