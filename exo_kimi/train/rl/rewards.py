"""Exact rewards of completions: right or wrong by the task's own answer, the format, and the length."""

from __future__ import annotations

import json
from dataclasses import dataclass

from exo_kimi.compress.compare.replies import Reply
from exo_kimi.compress.compare.tool_validity import call_problem
from exo_kimi.train.rl.prompts import RewardedPrompt

LENGTH_SLACK = 1.5
"""A completion may be so many times as long as the task's own reply before its length costs anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Rewards of one completion.

    Args:
        right: 1 for a right answer, 0 for any other.
        format: 1 where it ended by itself with closed think tags, and holds text or calls that a program could carry out; else 0.
        length: 0 as long as it is hardly longer than the task's own reply, falling to -1 at the most tokens.
    """

    right: float
    format: float
    length: float

    def total(self, weights: tuple[float, float, float]) -> float:
        """Their weighted sum."""
        return weights[0] * self.right + weights[1] * self.format + weights[2] * self.length


def reward(prompt: RewardedPrompt, reply: Reply, *, tokens: int, usual_tokens: int, most_tokens: int) -> Rewards:
    """Judge a completion.

    Args:
        prompt: what was asked.
        reply: the completion, parsed.
        tokens: of the completion.
        usual_tokens: of the task's own reply.
        most_tokens: that a completion may have.
    """
    return Rewards(
        right=float(is_right(prompt, reply)),
        format=float(is_well_formed(prompt, reply)),
        length=length_reward(tokens, usual_tokens, most_tokens),
    )


def is_right(prompt: RewardedPrompt, reply: Reply) -> bool:
    """Whether a reply is right, judged as `exo-kimi eval` judges it: a reply that did not end is wrong."""
    if not reply.closed:
        return False
    if prompt.call is not None:
        return _calls(reply) == [prompt.call]
    if prompt.used:
        return not reply.calls and all(part in reply.content for part in prompt.used)
    return not reply.calls and reply.content in prompt.accepted


def is_well_formed(prompt: RewardedPrompt, reply: Reply) -> bool:
    """Whether a reply ended by itself with closed think tags, and has text or valid calls of declared tools."""
    if not reply.closed:
        return False
    if reply.calls:
        return all(call_problem(call.name, call.arguments, prompt.tools or ()) is None for call in reply.calls)
    return bool(reply.content)


def length_reward(tokens: int, usual_tokens: int, most_tokens: int) -> float:
    """0 up to `LENGTH_SLACK` times the usual length, falling linearly to -1 at the most. Source: "DAPO", section 3.4."""
    free = LENGTH_SLACK * usual_tokens
    if tokens <= free:
        return 0.0
    return -min(1.0, (tokens - free) / max(most_tokens - free, 1.0))


def _calls(reply: Reply) -> list[tuple[str, object]] | None:
    """Name and arguments of each call; None where the arguments are no JSON."""
    try:
        return [(call.name, json.loads(call.arguments)) for call in reply.calls]
    except ValueError:
        return None
