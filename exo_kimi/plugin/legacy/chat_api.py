"""`POST /v1/chat/completions` of legacy exo, for our model: what a request asks for is honoured or refused by name, and the
reply leaves in the API's own fields. Other models go to exo's own method, unchanged.

exo's own ignores everything but the messages and the tools, streams raw text, and ends a broken stream without a word.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from exo_kimi.dialogue.events import (
    ContentEvent,
    EndEvent,
    ReasoningEvent,
    ReplyEvent,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEvent,
    WholeReply,
)
from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.request import ConversationRequest, SamplingOverrides, ToolChoice
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ChatError, ExoKimiError, OverloadedError, RequestError, StageStalledError, UnsupportedError
from exo_kimi.plugin.legacy.hook import Failure, cancel
from exo_kimi.plugin.legacy.replies import LegacyReply
from exo_kimi.plugin.legacy.tokenizer import RenderedPrompt
from exo_kimi.runtime.requests import FinishReason, TokenEvent

logger = logging.getLogger(__name__)
Method = Callable[..., Any]
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_WHOLE = ("top_k", "seed", "max_tokens", "max_completion_tokens")
_REFUSED = ("logit_bias", "logprobs", "response_format", "functions")
_IMAGES = ("image", "image_url", "input_image")
_LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
    "top_k": (0, 2**31),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyChat:
    """A request, read.

    Args:
        conversation: in the dialogue's terms.
        stream: send the reply as it comes.
        include_usage: send what it took at the end of a stream.
    """

    conversation: ConversationRequest
    stream: bool
    include_usage: bool


def read_chat(body: Mapping[str, Any], *, temperature: float) -> LegacyChat:
    """Read the JSON of a request.

    Args:
        body: the object.
        temperature: of a request that names none: exo's `--default-temp`.

    Raises:
        RequestError: a field that is wrong or cannot be honoured, by its name.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _wrong("messages", "a list of objects, one at least", messages)
    for message in messages:
        parts = message.get("content") if isinstance(message.get("content"), list) else []
        if any(isinstance(part, dict) and part.get("type") in _IMAGES for part in parts):
            raise UnsupportedError("images are not supported", expected="text", param="messages")
    for name in _REFUSED:
        if body.get(name) not in (None, False, [], {}, {"type": "text"}):
            raise UnsupportedError(f"'{name}' is not supported by legacy exo", fix="leave it out", param=name)
    if body.get("n") not in (None, 1):
        raise UnsupportedError("'n' is not supported by legacy exo", expected="1", found=body["n"], param="n")
    numbers = {name: _number(body, name, float) for name in _NUMBERS} | {
        name: _number(body, name, int) for name in _WHOLE
    }
    most = numbers.pop("max_completion_tokens") or numbers.pop("max_tokens", None)
    numbers.pop("max_tokens", None)
    if numbers["temperature"] is None:
        numbers["temperature"] = temperature
    options = body.get("stream_options") or {}
    return LegacyChat(
        conversation=ConversationRequest(
            messages=tuple(messages),
            tools=_tools(body),
            tool_choice=_tool_choice(body),
            sampling=SamplingOverrides(**numbers),
            max_tokens=None if most is None else int(most),
            stop=_stop(body),
        ),
        stream=bool(body.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )


def api_methods(
    original: Mapping[str, Method],
    *,
    name: str,
    speaker: Speaker,
    web: Any,
    shard: Callable[[], Any],
    silent: Callable[[], str],
) -> dict[str, Method]:
    """Methods for exo's API class.

    Args:
        original: exo's own, by name.
        name: of our model in exo's API.
        speaker: of the checkpoint.
        web: aiohttp's, as exo has imported it.
        shard: makes exo's Shard of the model.
        silent: says which node does not answer; empty when all do.
    """

    async def handle_post_chat_completions(self: Any, request: Any) -> Any:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if isinstance(body, dict) and _model_of(self, body) != name:
            return await original["handle_post_chat_completions"](self, request)
        try:
            if not isinstance(body, dict):
                raise RequestError("the body is not a JSON object", expected="an object with `messages`")
            chat = read_chat(body, temperature=self.node.default_sample_temperature)
            if away := silent():
                raise StageStalledError(away, fix="look at that machine; ask again when it is back")
            prepared = await asyncio.to_thread(prepare, _with_system_prompt(self, chat.conversation), speaker)
            reply = _Reply(self, name, prepared, shard())
            async with aclosing(reply.events()) as events:
                first = await anext(events)
                if chat.stream:
                    return await _stream(web, request, chat, reply, first, events)
                found = [*first, *[event for more in [each async for each in events] for event in more]]
            return web.json_response(reply.whole(WholeReply.of(found)))
        except ExoKimiError as error:
            return web.json_response(_problem(error), status=_status(error))
        except Exception as error:  # the edge between our code and exo, which would answer with nothing
            logger.exception("a request failed")
            return web.json_response(_problem(error), status=500)

    return {"handle_post_chat_completions": handle_post_chat_completions}


async def _stream(
    web: Any,
    request: Any,
    chat: LegacyChat,
    reply: _Reply,
    first: list[ReplyEvent],
    events: AsyncGenerator[list[ReplyEvent], None],
) -> Any:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(status=200, reason="OK", headers=headers)
    await response.prepare(request)

    async def say(value: Any) -> None:
        await response.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

    try:
        await say(reply.chunk({"role": "assistant", "content": ""}))
        for delta in reply.deltas(first):
            await say(delta)
        async for more in events:
            for delta in reply.deltas(more):
                await say(delta)
        if chat.include_usage and reply.end is not None:
            await say(reply.envelope("chat.completion.chunk") | {"choices": [], "usage": reply.usage(reply.end)})
    except ExoKimiError as error:
        await say(_problem(error))
    await say("[DONE]")
    await response.write_eof()
    return response


class _Reply:
    """One reply: its events from exo's queue of tokens, and its answer in OpenAI's fields.

    Args:
        api: exo's, which has the queues.
        name: of the model.
        prepared: the request, of one choice.
        shard: exo's, of the model.
    """

    def __init__(self, api: Any, name: str, prepared: PreparedRequest, shard: Any) -> None:
        self.end: EndEvent | None = None
        self._api, self._name, self._prepared, self._shard = api, name, prepared, shard
        self._id = str(uuid.uuid4())
        self._created = int(time.time())

    async def events(self) -> AsyncGenerator[list[ReplyEvent], None]:
        """The events of each token. Closing it before the end ends the reply on every node.

        Raises:
            ExoKimiError: why it ends early.
        """
        (choice,) = self._prepared.choices
        node, decoder, queue = self._api.node, choice.decoder, self._api.token_queues[self._id]
        sampling = choice.request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(62))
        ids = choice.request.prompt_ids
        wanted = LegacyReply(sampling=sampling, max_tokens=choice.request.max_tokens, prompt_tokens=len(ids))
        text = RenderedPrompt(f"({len(ids)} tokens)", ids)
        prompting = asyncio.create_task(
            node.process_prompt(self._shard, text, request_id=self._id, inference_state=wanted.to_state())
        )
        complete = False
        try:
            while not complete:
                tokens, complete = await self._next(queue, prompting)
                for number, token_id in enumerate(tokens, 1):
                    ended = complete and number == len(tokens)
                    stopped = int(token_id) in choice.request.stop_ids
                    reason: FinishReason | None = ("stop" if stopped else "length") if ended else None
                    yield decoder.feed(TokenEvent(token_id=int(token_id), finish_reason=reason))
                if decoder.satisfied:
                    break
            yield decoder.finish()
        finally:
            prompting.cancel()
            self._api.token_queues.pop(self._id, None)
            if not complete:
                await cancel(node, self._id)

    async def _next(self, queue: Any, prompting: asyncio.Task[Any]) -> tuple[list[int], bool]:
        """The next tokens. The prompt may fail before there is one, on this node or on another."""
        getting = asyncio.ensure_future(queue.get())
        try:
            waiting = {getting} if prompting.done() else {getting, prompting}
            async with asyncio.timeout(self._api.response_timeout):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    prompting.result()
                    await asyncio.wait({getting})
            item = getting.result()
        except TimeoutError:
            raise OverloadedError(
                "no token came in time",
                expected=f"one within {self._api.response_timeout:g} s",
                fix="start exo with a longer --chatgpt-api-response-timeout",
            ) from None
        finally:
            getting.cancel()
        if isinstance(item, Failure):
            raise item.error
        tokens, complete = item
        return tokens, complete

    def envelope(self, kind: str) -> dict[str, Any]:
        """What an answer and each of its chunks have in common."""
        return {"id": f"chatcmpl-{self._id}", "object": kind, "created": self._created, "model": self._name}

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.envelope("chat.completion.chunk") | {"choices": [choice]}

    def deltas(self, events: list[ReplyEvent]) -> list[dict[str, Any]]:
        """The chunks of some events."""
        found = []
        for event in events:
            match event:
                case ContentEvent(text=text):
                    found.append(self.chunk({"content": text}))
                case ReasoningEvent(text=text):
                    found.append(self.chunk({"reasoning_content": text}))
                case ToolCallBegin(index=index, id=call_id, name=function):
                    begun = {"index": index, "id": call_id, "type": "function"}
                    call = begun | {"function": {"name": function, "arguments": ""}}
                    found.append(self.chunk({"tool_calls": [call]}))
                case ToolCallDelta(index=index, arguments=arguments):
                    found.append(self.chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}))
                case ToolCallEvent():
                    pass  # its pieces are out already
                case EndEvent():
                    self.end = event
                    found.append(self.chunk({}, event.finish_reason))
        return found

    def whole(self, reply: WholeReply) -> dict[str, Any]:
        """An answer in one object."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reply.tool_calls
            ]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.end.finish_reason}
        return self.envelope("chat.completion") | {"choices": [choice], "usage": self.usage(reply.end)}

    def usage(self, end: EndEvent) -> dict[str, Any]:
        """OpenAI's count of tokens."""
        usage = self._prepared.usage([end])
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "accepted_prediction_tokens": usage.accepted_drafts,
                "rejected_prediction_tokens": usage.rejected_drafts,
            },
        }


def _model_of(api: Any, body: Mapping[str, Any]) -> Any:
    """The model that exo takes: its default for a name that it does not know."""
    wanted = body.get("model", api.default_model)
    known = isinstance(wanted, str) and wanted in import_module("exo.models").model_cards
    return wanted if known and not wanted.startswith("gpt-") else api.default_model


def _with_system_prompt(api: Any, conversation: ConversationRequest) -> ConversationRequest:
    """exo's own `--system-prompt`, where the conversation has none."""
    if not api.system_prompt or any(each.get("role") == "system" for each in conversation.messages):
        return conversation
    return replace(conversation, messages=({"role": "system", "content": api.system_prompt}, *conversation.messages))


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return None
    low, high = _LIMITS[name]
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (kind is int and int(value) != value):
        raise _wrong(name, f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}", value)
    return kind(value)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > 16 or not all(isinstance(each, str) and each for each in found):
        raise _wrong("stop", "a string, or up to 16 of them", stop)
    return tuple(found)


def _tools(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = body.get("tools") or []
    good = isinstance(tools, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("function"), dict)
        and isinstance(each["function"].get("name"), str)
        for each in tools
    )
    if not good:
        raise _wrong("tools", "a list of functions, each with a name", tools)
    # The sampling of legacy exo knows no grammar: `strict` would be a promise that nobody keeps.
    return tuple(
        {**each, "function": {key: value for key, value in each["function"].items() if key != "strict"}}
        for each in tools
    )


def _tool_choice(body: Mapping[str, Any]) -> ToolChoice:
    choice = body.get("tool_choice")
    parallel = body.get("parallel_tool_calls") is not False
    if choice in (None, "auto"):
        return ToolChoice(parallel=parallel)
    if choice == "none":
        return ToolChoice(mode="none")
    raise UnsupportedError(
        "a tool call cannot be forced in legacy exo", expected="'auto' or 'none'", found=choice, param="tool_choice"
    )


def _wrong(name: str, expected: str, found: object) -> RequestError:
    return RequestError(f"'{name}' is not valid", expected=expected, found=repr(found)[:80], param=name)


def _status(error: ExoKimiError) -> int:
    if isinstance(error, OverloadedError | StageStalledError):
        return 503
    return 400 if isinstance(error, RequestError | ChatError) else 500


def _problem(error: Exception) -> dict[str, Any]:
    """OpenAI's error object, with exo's own `detail` beside it."""
    message = str(error) if isinstance(error, ExoKimiError) else f"{type(error).__name__}: {error}"
    refused = isinstance(error, RequestError | ChatError)
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if refused else "server_error",
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        },
        "detail": message,
    }
