"""What legacy exo's Node does for our model, as methods that stand before its own: who holds what is the plan's, prompts go in
pieces, and a failure reaches whoever asked. Other models go to exo's own methods, unchanged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from itertools import permutations
from typing import Any

import numpy as np

from exo_kimi.errors import ExoKimiError, ExoPlacementError, OverloadedError, StageStalledError
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.replies import LegacyReply, Replies, carried, reply_of
from exo_kimi.plugin.legacy.tensors import IDS, TensorPosition, ids_of, position_of
from exo_kimi.plugin.legacy.tokenizer import LegacyTokenizer, RenderedPrompt

logger = logging.getLogger(__name__)
Method = Callable[..., Any]
FAILED = "exo_kimi_failed"
# A piece of a prompt is one message, under gRPC's 256 MiB here (18,724 tokens of K2 at 2 bytes), and small enough that the
# next stage works on one while this one works on the next.
PIECE_TOKENS = 1024
PIECE_BYTES = 64 << 20
SEEN_S, LOOK_S = 10.0, 0.25  # how long a prompt waits for the plan's nodes, and how often it looks


def piece_tokens(hidden_size: int) -> int:
    """Prompt tokens of one message, by four bytes a value."""
    return max(1, min(PIECE_TOKENS, PIECE_BYTES // (4 * hidden_size)))


def node_methods(
    original: Mapping[str, Method],
    *,
    pinned: PinnedPlan,
    tokenizer: LegacyTokenizer,
    hidden_size: int,
    replies: Replies,
    say: Callable[[str], None],
) -> dict[str, Method]:
    """Methods for exo's Node class.

    Args:
        original: exo's own, by name.
        pinned: the plan.
        tokenizer: of the checkpoint.
        hidden_size: of the model.
        replies: of this node.
        say: takes lines for the user.
    """
    digest, size = pinned.digest, piece_tokens(hidden_size)
    running: set[asyncio.Task[None]] = set()

    def get_current_shard(self: Any, base_shard: Any, index: int | None = None) -> Any:
        """The plan's, whoever is there at the moment."""
        if base_shard.model_id != pinned.name:
            return original["get_current_shard"](self, base_shard, index)
        node_id = self.id if index is None else _partition_ids(self)[index]
        start, last = pinned.range_of(node_id)
        return type(base_shard)(pinned.name, start, last, pinned.layers)

    async def process_prompt(
        self: Any, base_shard: Any, prompt: str, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        """exo's own, with the prompt's ids beside its text."""
        if base_shard.model_id != pinned.name or not isinstance(prompt, RenderedPrompt):
            return await original["process_prompt"](self, base_shard, prompt, request_id, inference_state)
        state = {**(inference_state or {}), IDS: list(prompt.ids)}
        if request_id is not None:
            replies.asked.add(request_id)
        try:
            return await original["process_prompt"](self, base_shard, str(prompt), request_id, state)
        except BaseException:
            replies.asked.discard(str(request_id))  # the API is told by this very error
            raise

    async def process_first(self: Any, shard: Any, prompt: str, request_id: str, inference_state: Any) -> Any:
        """A prompt through this node's layers and on, piece by piece: while the next stage works on one, this one works on
        the following."""
        await _wait_all_here(self, pinned)
        ids = ids_of(inference_state) or tokenizer.encode(prompt)
        if len(ids) >= pinned.tokens:
            raise OverloadedError(
                "the prompt is longer than the plan has room for",
                expected=f"under {pinned.tokens} tokens",
                found=len(ids),
                fix="plan again with more --context",
            )
        sending: asyncio.Task[None] | None = None
        wanted = carried(inference_state)
        for start in range(0, len(ids), size):
            if replies.is_over(request_id):
                return None
            piece = np.array([ids[start : start + size]], np.int64)
            position = TensorPosition(plan=digest, offset=start, layer=0, more=start + size < len(ids))
            result, state = await self.inference_engine.infer_tensor(
                request_id, shard, piece, {**position.to_state(), **wanted}
            )
            if sending is not None:
                await sending
            if position.more and not shard.is_last_layer():
                sending = asyncio.create_task(_forward(self, shard, result, request_id, state))
        await self.process_inference_result(shard, result, request_id, state)
        return result

    async def _process_prompt(
        self: Any, base_shard: Any, prompt: str, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        shard = self.get_current_shard(base_shard)
        if base_shard.model_id != pinned.name or not shard.is_first_layer():
            if base_shard.model_id == pinned.name:
                await _wait_all_here(self, pinned)
            return await original["_process_prompt"](self, base_shard, prompt, request_id, inference_state)
        ident = str(request_id)
        self.outstanding_requests[ident] = "processing"
        try:
            return await process_first(self, shard, prompt, ident, inference_state)
        except Exception as error:  # the edge between our code and exo: every node is told, exo answers
            await fail(self, ident, error, say)
            raise

    async def process_tensor(
        self: Any, base_shard: Any, tensor: Any, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        """exo's own prints an error and leaves the one who asked waiting."""
        if base_shard.model_id != pinned.name:
            return await original["process_tensor"](self, base_shard, tensor, request_id, inference_state)
        ident = str(request_id)
        if replies.is_over(ident):
            return None  # it was on its way while somebody ended the request
        try:
            shard = self.get_current_shard(base_shard)
            self.outstanding_requests[ident] = "processing"
            result, state = await self.inference_engine.infer_tensor(ident, shard, tensor, inference_state)
            if not position_of(state).more:
                await self.process_inference_result(shard, result, ident, state)
            elif not shard.is_last_layer():
                await _forward(self, shard, result, ident, state)
        except Exception as error:  # the edge between our code and exo
            if replies.is_over(ident):
                self.outstanding_requests.pop(ident, None)  # its caches are gone already, which is no failure
                return None
            if not isinstance(error, ExoKimiError):
                logger.exception("request %s failed", ident)
            await fail(self, ident, error, say)
        return None

    async def process_inference_result(
        self: Any, shard: Any, result: Any, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        """exo's own chooses every token by the node's temperature, ends at one id, and knows one limit for all."""
        if shard.model_id != pinned.name:
            return await original["process_inference_result"](self, shard, result, request_id, inference_state)
        ident, complete, forward = str(request_id), False, result
        if replies.is_over(ident):
            self.outstanding_requests.pop(ident, None)
            return None
        if shard.is_last_layer():
            wanted = reply_of(inference_state) or default_reply(self, ident)
            token_id, complete = await asyncio.to_thread(
                replies.next_token,
                ident,
                result,
                position_of(inference_state),
                wanted,
                node_limit=self.max_generate_tokens,
            )
            forward = np.array([[token_id]], np.int64)
            self.trigger_on_token_callbacks(ident, [token_id], complete)
            start(self.broadcast_result(ident, [token_id], complete))
        if complete:
            self.outstanding_requests.pop(ident, None)
        else:
            self.outstanding_requests[ident] = "waiting"
            start(self.forward_tensor(shard, forward, ident, self.get_partition_index(offset=1), inference_state))
        return None

    def default_reply(self: Any, ident: str) -> LegacyReply:
        """One for all tokens of a reply, for its seed."""
        return replies.defaults.setdefault(ident, LegacyReply.of_node(self.default_sample_temperature))

    def start(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        running.add(task)  # the loop alone would let it be collected
        task.add_done_callback(running.discard)

    async def forward_tensor(
        self: Any, base_shard: Any, tensor: Any, request_id: str, target_index: int, inference_state: Any = None
    ) -> None:
        """exo starts this as a task that nobody waits for."""
        ours = base_shard.model_id == pinned.name
        try:
            await original["forward_tensor"](self, base_shard, tensor, request_id, target_index, inference_state)
        except Exception as error:  # the edge between our code and exo
            if not ours:
                raise
            await fail(self, request_id, error, say)

    async def _forward(self: Any, shard: Any, tensor: Any, request_id: str, state: Any) -> None:
        await original["forward_tensor"](self, shard, tensor, request_id, self.get_partition_index(offset=1), state)

    return {
        "get_current_shard": get_current_shard,
        "process_prompt": process_prompt,
        "_process_prompt": _process_prompt,
        "process_inference_result": process_inference_result,
        "process_tensor": process_tensor,
        "forward_tensor": forward_tensor,
    }


async def fail(node: Any, request_id: str, error: BaseException, say: Callable[[str], None]) -> None:
    """Tell every node that a request is over, the one that asked among them."""
    message = str(error) if isinstance(error, ExoKimiError) else f"{type(error).__name__}: {error}"
    say(f"request {request_id} failed on {node.id}: {message}")
    node.outstanding_requests.pop(request_id, None)
    busy = isinstance(error, OverloadedError | StageStalledError)
    status = {"type": FAILED, "node_id": node.id, "request_id": request_id, "message": message, "busy": busy}
    await node.broadcast_opaque_status(request_id, json.dumps(status))


def _partition_ids(node: Any) -> list[str]:
    return [str(each.node_id) for each in node.partitioning_strategy.partition(node.topology)]


async def _wait_all_here(node: Any, pinned: PinnedPlan) -> None:
    """Until every node of the plan sees every other: one that does not see the next would send to itself, and one that does not
    see the API's would be heard by nobody."""
    until_s = time.monotonic() + SEEN_S
    while lacking := _lacking(node, pinned):
        if time.monotonic() > until_s:
            raise ExoPlacementError(
                lacking,
                expected=f"{', '.join(pinned.node_ids)}, each seeing all others",
                found=", ".join(sorted(_partition_ids(node))),
                fix="start it with the same plan; nodes see each other some seconds later",
            )
        await asyncio.sleep(LOOK_S)


def _lacking(node: Any, pinned: PinnedPlan) -> str | None:
    here = {node.id, *(peer.id() for peer in node.peers)} & set(_partition_ids(node))
    if away := [node_id for node_id in pinned.node_ids if node_id not in here]:
        return f"{away[0]} is not in the cluster, and the plan needs it"
    edges = {(start, edge.to_id) for start, ends in node.topology.peer_graph.items() for edge in ends}
    blind = [pair for pair in permutations(pinned.node_ids, 2) if pair not in edges]
    return f"{blind[0][0]} does not see {blind[0][1]}" if blind else None
