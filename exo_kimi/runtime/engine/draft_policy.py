"""How many guesses are worth their bytes: pure arithmetic on counted bytes and chances. It knows nothing of sequences.

Decoding is bound by the bytes that a step reads. What all tokens share is read once, but a mixture of experts reads more
experts for every further token, so a guess costs bytes whether it is right or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """What a step reads.

    Args:
        shared_bytes: by every step: all weights but routed experts and the embedding.
        expert_bytes: of all routed experts together.
        experts: of a layer.
        experts_per_token: of them that a token goes through.
        kv_token_bytes: cache of one token, all layers.
    """

    shared_bytes: int
    expert_bytes: int
    experts: int
    experts_per_token: int
    kv_token_bytes: int

    def read(self, tokens: float, *, cached_tokens: int = 0) -> float:
        """Bytes that a step of `tokens` tokens reads, whose sequences hold `cached_tokens` in all.

        E (1 - (1 - K/E)^m) distinct experts are expected when m tokens choose independently; a cache is read once for all
        the tokens of its sequence.
        """
        share: float = 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens
        return self.shared_bytes + self.expert_bytes * share + self.kv_token_bytes * cached_tokens


def choose_drafts(
    chances: Sequence[Sequence[float]], read: Callable[[int], float], *, others: int = 0, room: int | None = None
) -> list[int]:
    """How many guesses each sequence of a group gets, for the most expected tokens per byte.

    All orders of adding guesses cost the same bytes, so for any number of them the likeliest are best; every number is tried.

    Args:
        chances: for each sequence, for each of its guesses the chance that it and all before it are right (none rises).
        read: bytes of a step of so many tokens.
        others: tokens of the step that are of other sequences.
        room: most guesses in all.

    Returns:
        One number a sequence, 0 where guesses do not pay.
    """
    counts = [0] * len(chances)
    ranked = sorted(
        ((-chance, place, row) for row, line in enumerate(chances) for place, chance in enumerate(line)),
    )
    ranked = ranked if room is None else ranked[: max(0, room)]
    tokens = len(chances) + others
    expected = float(len(chances))
    best, best_rate = 0, expected / read(tokens)
    for added, (minus_chance, _, _) in enumerate(ranked, start=1):
        expected -= minus_chance
        rate = expected / read(tokens + added)
        if rate > best_rate:
            best, best_rate = added, rate
    for _, _, row in ranked[:best]:
        counts[row] += 1
    return counts
