"""Replies in progress inside legacy exo: what each request wants, who chooses its next token, and which are over.

exo itself carries a temperature for the whole node and no other wish. What a request wants goes through exo's own
`inference_state`, round all nodes, so that the node with the last layers has it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np

from exo_kimi.errors import ProtocolError
from exo_kimi.plugin.legacy.tensors import Array, TensorPosition
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.sampling import SequenceSampler, sample
from exo_kimi.runtime.steps import SequenceStart

REPLY = "exo_kimi_reply"
REMEMBERED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyReply:
    """What a request wants of its reply.

    Args:
        sampling: with a seed wherever a temperature makes chance play.
        max_tokens: most tokens of the reply; None leaves it to the node.
        prompt_tokens: of its prompt.
    """

    sampling: SamplingParams
    max_tokens: int | None = None
    prompt_tokens: int = 0

    @classmethod
    def of_node(cls, temperature: float) -> LegacyReply:
        """Of a prompt that comes without wishes, as from exo's own terminal chat."""
        return cls(sampling=SamplingParams(temperature=temperature, seed=secrets.randbits(62)))

    def to_state(self) -> dict[str, Any]:
        """As a part of exo's `inference_state`."""
        return {REPLY: asdict(self)}


def reply_of(state: Mapping[str, Any] | None) -> LegacyReply | None:
    """Read it from exo's `inference_state`; None when the prompt came without.

    Raises:
        ProtocolError: it is something else.
    """
    told = (state or {}).get(REPLY)
    if told is None:
        return None
    try:
        return msgspec.convert(told, LegacyReply)
    except msgspec.ValidationError as error:
        raise ProtocolError(
            "a reply's wishes in a form that no exo-kimi sent",
            expected="every node started by `exo-kimi exo-legacy`, of one version",
            found=error,
        ) from error


def carried(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of exo's `inference_state` that goes round with the tensors."""
    told = (state or {}).get(REPLY)
    return {} if told is None else {REPLY: told}


@dataclass(slots=True)
class Replies:
    """The replies of one node.

    Args:
        stop_ids: token ids that end a turn.
        room_tokens: of all sequences together, by the plan.
    """

    stop_ids: frozenset[int]
    room_tokens: int
    asked: set[str] = field(default_factory=set)  # this node's API waits for them
    defaults: dict[str, LegacyReply] = field(default_factory=dict)  # of those that came without wishes
    _samplers: dict[str, SequenceSampler] = field(default_factory=dict)
    _over: dict[str, None] = field(default_factory=dict)

    def next_token(
        self, request_id: str, logits: Array, position: TensorPosition, wanted: LegacyReply, *, node_limit: int
    ) -> tuple[int, bool]:
        """Choose the token that follows.

        Args:
            request_id: exo's.
            logits: (1, L, vocab) float32; the last row counts.
            position: of the token.
            wanted: by the request.
            node_limit: most tokens of any reply, by this node's own option.

        Returns:
            The token, and whether it is the last.
        """
        sampler = self._samplers.get(request_id)
        if sampler is None:
            start = SequenceStart(seq_id=0, prompt_tokens=wanted.prompt_tokens, sampling=wanted.sampling)
            sampler = self._samplers[request_id] = SequenceSampler(start)
        (chosen,) = sample(np.asarray(logits[0, -1:], np.float32), [sampler], [None])
        limit = node_limit if wanted.max_tokens is None else min(node_limit, wanted.max_tokens)
        full = sampler.generated_tokens >= limit or position.offset >= self.room_tokens
        return chosen.token_id, chosen.token_id in self.stop_ids or full

    def end(self, request_id: str) -> None:
        """It is over: what still comes of it is passed over."""
        self.asked.discard(request_id)
        self._samplers.pop(request_id, None)
        self.defaults.pop(request_id, None)
        self._over[request_id] = None
        while len(self._over) > REMEMBERED:
            del self._over[next(iter(self._over))]

    def is_over(self, request_id: str) -> bool:
        """Whether it ended, failed or was cancelled."""
        return request_id in self._over


class Liveness:
    """When the other nodes of a plan were last heard. Time in which this process itself stood still counts for nobody.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_s: dict[str, float] = {}

    def hear(self, node_id: str) -> None:
        """A node lives."""
        self._heard_s[node_id] = self._clock()

    def forgive(self) -> None:
        """Begin anew for all of them."""
        for node_id in self._heard_s:
            self.hear(node_id)

    def silent(self, longer_than_s: float) -> tuple[str, float] | None:
        """The quietest node of those that have ever been heard, and for how long, if that is too long."""
        now_s = self._clock()
        found = max(((now_s - at_s, node_id) for node_id, at_s in self._heard_s.items()), default=(0.0, ""))
        return (found[1], found[0]) if found[0] > longer_than_s else None
