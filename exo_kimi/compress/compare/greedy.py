"""Greedy replies to many prompts; prompts of one length go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx

from exo_kimi.models.kimi_k2 import Model


def greedy(
    model: Model, prompts: Sequence[Sequence[int]], *, stop_ids: frozenset[int], max_tokens: int, together: int = 64
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the token that stopped it.

    Args:
        prompts: token ids, at least one each.
        stop_ids: tokens that end a reply.
        max_tokens: the most tokens of a reply.
        together: the most prompts in one forward pass.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, same in groupby(order, key=lambda index: len(prompts[index])):
        indices = list(same)
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            for index, reply in zip(
                part, _together(model, [prompts[i] for i in part], stop_ids, max_tokens), strict=True
            ):
                replies[index] = reply
    return replies


def _together(model: Model, prompts: list[Sequence[int]], stop_ids: frozenset[int], max_tokens: int) -> list[list[int]]:
    replies: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    cache = model.make_cache()
    inputs = mx.array([list(prompt) for prompt in prompts])
    for _ in range(max_tokens):
        chosen = model(inputs, cache)[:, -1].argmax(-1)
        tokens: list[int] = chosen.tolist()  # type: ignore[assignment]
        for index in list(going):
            if tokens[index] in stop_ids:
                going.discard(index)
            else:
                replies[index].append(tokens[index])
        if not going:
            break
        inputs = chosen[:, None]
    return replies
