"""Gates of a pruned model: its replies may not loop more, leave think tags open more, or call tools worse than the original's."""

from __future__ import annotations

from exo_kimi.compress.compare.replies import Behaviour
from exo_kimi.compress.compare.score import Score
from exo_kimi.compress.prune.profile import ReplyGate

MARGIN = 0.02
"""How much lower a share may be than the original's: two replies of a hundred."""

_NAMES = {
    "without_loop": "replies without a loop",
    "closed": "think tags closed, reply ended",
    "called": "a tool called where one is needed",
    "calls_valid": "tool calls valid",
}


def gates_of(reference: Behaviour, subject: Behaviour) -> tuple[ReplyGate, ...]:
    """One gate a measure; left out where the original has no case of it, closed where only the subject has none."""
    gates = []
    for field, name in _NAMES.items():
        ours: Score = getattr(reference, field)
        theirs: Score = getattr(subject, field)
        if ours.count:
            passed = theirs.count > 0 and theirs.share >= ours.share - MARGIN
            text = f"{theirs.right} of {theirs.count}, the original {ours.right} of {ours.count}"
            gates.append(ReplyGate(name=name, passed=passed, text=text))
    return tuple(gates)
