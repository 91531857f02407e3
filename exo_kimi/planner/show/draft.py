"""What a plan says of a draft head: its bytes on the last stage, features on the links, and from which acceptance on it pays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from exo_kimi.planner.search.cost import PlacedSplit, drafted_step_s
from exo_kimi.planner.weights.draft import DraftBytes
from exo_kimi.units import format_bytes

MOST_GUESSES = 6
CHANCES = (0.4, 0.6, 0.8)
"""Of a guess, if those before it are right, for the columns of the table."""
_CHAIN = 3  # what authors measure with


def draft_text(split: PlacedSplit) -> str:
    """The section of a plan; empty without a head."""
    head = split.question.draft
    if head is None:
        return ""
    return "\n".join(["Draft head", *(f"  {line}" for line in _lines(split, head)), ""])


def expected_tokens(chance: float, guesses: int) -> float:
    """Tokens of a step, 1 + c + c^2 + ..., when each guess is right with the same chance, given that those before it are."""
    return sum(chance**place for place in range(guesses + 1))


def chance_of(tokens_per_step: float, guesses: int) -> float:
    """The chance of one guess behind tokens of a step, by halving."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, guesses) < tokens_per_step else (low, middle)
    return low


def break_even(split: PlacedSplit, guesses: int) -> float:
    """Tokens of a step from which so many guesses are faster than none."""
    return drafted_step_s(split, guesses) / split.prediction.tpot_s


def drafted_tokens_per_s(split: PlacedSplit, guesses: int, chance: float) -> float:
    """Of one sequence whose guesses are right with a chance."""
    return expected_tokens(chance, guesses) / drafted_step_s(split, guesses)


def _lines(split: PlacedSplit, head: DraftBytes) -> Iterator[str]:
    question, last = split.question, split.stages[-1]
    weight_bytes = head.weights_on(last.start_layer, embedding_bytes=question.model.embedding_bytes)
    kv_bytes = question.workload.kv_tokens * head.kv_token_bytes
    features = question.features_bytes(last.end_layer)
    config = head.config
    words = f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens"
    yield f"{head.name}: {config.kind.upper()}, EAGLE-{config.version}, {words}; {head.source}"
    yield (
        f"on {last.machine.name}, the last stage: {format_bytes(weight_bytes)} ({weight_bytes} bytes) of weights"
        + (", the target's embedding among them" if weight_bytes != head.resident_bytes else "")
        + f", {format_bytes(kv_bytes)} ({kv_bytes}) of cache, {format_bytes(features)} ({features}) of features"
    )
    for one, other in pairwise(split.stages):
        count = head.features_before(other.start_layer)
        size = count * head.feature_bytes
        yield (
            f"{one.machine.name} to {other.machine.name}: {count} more hidden states of {1 + count} a token, {size:,} bytes, "
            f"{format_bytes(size * question.workload.prefill_chunk)} a chunk of {question.workload.prefill_chunk}"
        )
    yield from _table(split, head)


def _table(split: PlacedSplit, head: DraftBytes) -> Iterator[str]:
    plain = split.prediction.decode_tokens_per_s
    known = head.tokens_per_step
    chances = [*CHANCES, *([] if known is None else [chance_of(known, _CHAIN)])]
    yield f"without guesses {plain:.2f} tokens/s; with, by the chance that a guess is right when those before it are:"
    named = [f"{chance:.2f}" for chance in CHANCES] + ([] if known is None else ["published"])
    yield f"  {'guesses':<8} {'a step':>9} {'pays from':>16}  " + " ".join(f"{name:>10}" for name in named)
    for guesses in range(1, MOST_GUESSES + 1):
        speeds = " ".join(f"{drafted_tokens_per_s(split, guesses, chance):>10.2f}" for chance in chances)
        step_s, even = drafted_step_s(split, guesses), break_even(split, guesses)
        yield f"  {guesses:<8} {step_s * 1000:>6.1f} ms {even:>9.2f} tokens  {speeds}"
    if known is not None:
        best = max(range(MOST_GUESSES + 1), key=lambda count: drafted_tokens_per_s(split, count, chances[-1]))
        speed = drafted_tokens_per_s(split, best, chances[-1])
        gain = f"the best number is {best}, {speed / plain:.2f} times as fast as none"
        yield f"published: {known} tokens a step of {_CHAIN} guesses; {gain}."
