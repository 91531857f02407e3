"""From a request to the sequences that the engine generates, each with the decoder of its reply, and to their events.

A prompt is rendered once; each of its `n` replies has a seed, a decoder and a grammar of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from exo_kimi.chat.constraint import no_tools_bias
from exo_kimi.chat.history import CallHistory
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.vision import NoVision
from exo_kimi.dialogue.constraints import ReplyForm, reply_constraint
from exo_kimi.dialogue.decoding import ReplyDecoder, TextParser
from exo_kimi.dialogue.events import EndEvent, ReplyEvent, Usage
from exo_kimi.dialogue.pictures import leave_out_pictures, take_pictures
from exo_kimi.dialogue.reasoning import check_reasoning, settle_effort
from exo_kimi.dialogue.request import ConversationRequest, ReplyOptions, TextRequest, ToolMode
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError
from exo_kimi.runtime.requests import (
    GenerationRequest,
    SamplingParams,
    ServedAdapter,
    TextEngine,
    TokenConstraint,
    TokenEvent,
)

_SEED_RANGE = 2**63
_COUNTED_CONTEXTS = 2  # a prompt over the context is counted so far, for the error's sake


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sequence to generate and the decoder of its reply; both serve once."""

    request: GenerationRequest
    decoder: ReplyDecoder

    async def generate(self, engine: TextEngine) -> AsyncGenerator[tuple[TokenEvent | None, list[ReplyEvent]], None]:
        """Each token with the events that it completes; at last None with what was held back and the EndEvent.

        Closing the generator cancels the sequence on every stage.

        Raises:
            ExoKimiError: what the engine raises.
        """
        async with aclosing(engine.generate(self.request)) as tokens:
            async for token in tokens:
                yield token, self.decoder.feed(token)
                if self.decoder.satisfied:
                    break
        yield None, self.decoder.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """The sequences of one request.

    Args:
        choices: `choices_per_prompt` for each prompt, prompt after prompt.
        prompt_tokens: of all prompts together.
        choices_per_prompt: `n`.
        warnings: what of the request is not carried out as it was asked, a sentence each, for the answer.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    choices_per_prompt: int
    warnings: tuple[str, ...] = ()

    def named(self, request_id: str) -> PreparedRequest:
        """This request under the id by which its client knows it; further choices get a number behind it."""
        names = [request_id + (f"-{index}" if index else "") for index in range(len(self.choices))]
        choices = [
            replace(choice, request=replace(choice.request, request_id=name))
            for choice, name in zip(self.choices, names, strict=True)
        ]
        return replace(self, choices=tuple(choices))

    def through(self, adapter: ServedAdapter | None) -> PreparedRequest:
        """This request with the weights of an adapter; None for those of the base."""
        if adapter is None:
            return self
        choices = [replace(choice, request=replace(choice.request, adapter=adapter)) for choice in self.choices]
        return replace(self, choices=tuple(choices))

    def checked(self, engine: TextEngine) -> PreparedRequest:
        """This request, once the engine would admit every choice of it; with a warning where it cuts `max_tokens`.

        Raises:
            ExoKimiError: what the engine would raise before it admits a choice.
        """
        cut: dict[str, None] = {}
        for choice in self.choices:
            wanted, room = choice.request.max_tokens, engine.check(choice.request)
            if wanted is not None and room is not None and room < wanted:
                prompt = len(choice.request.prompt_ids)
                cut[f"max_tokens {wanted} was cut to {room}: no more fit behind {prompt} prompt tokens"] = None
        return replace(self, warnings=(*self.warnings, *cut))

    def usage(self, ends: Sequence[EndEvent]) -> Usage:
        """What the whole request took. The choices of one prompt share it: it is counted once, and as cached as far as it was
        for all of them, since what one choice took from another was computed for this request.

        Args:
            ends: the end of every choice, by choice index.
        """
        count = self.choices_per_prompt
        groups = [ends[begin : begin + count] for begin in range(0, len(ends), count)]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(end.completion_tokens for end in ends),
            cached_tokens=sum(min(end.cached_tokens for end in group) for group in groups),
            reasoning_tokens=sum(end.reasoning_tokens for end in ends),
            accepted_drafts=sum(end.accepted_drafts for end in ends),
            rejected_drafts=sum(end.rejected_drafts for end in ends),
        )


def prepare(
    request: ConversationRequest | TextRequest, speaker: Speaker, *, context: int | None = None
) -> PreparedRequest:
    """Render, encode and constrain. Slow for long prompts: call it in a thread.

    Args:
        request: of any door.
        speaker: of the checkpoint.
        context: of the engine, in tokens; a prompt is encoded to twice as many at most. None encodes all.

    Raises:
        RequestError: a message, tool, prompt or option that cannot be honoured.
        ContextLengthError: a prompt is so much longer than the context that nobody needs to know by how much.
        TemplateError: the template refuses the messages.
    """
    most_tokens = None if context is None else _COUNTED_CONTEXTS * context
    if isinstance(request, TextRequest):
        return _prepare_texts(request, speaker, most_tokens)
    return _prepare_conversation(request, speaker, most_tokens)


def _prepare_conversation(request: ConversationRequest, speaker: Speaker, most_tokens: int | None) -> PreparedRequest:
    tokenizer, template = speaker.tokenizer, speaker.template
    told = list(request.warnings)
    request = _with_gained_tools(request, shown=template.shows_message_tools, told=told)
    request = settle_effort(request, template, told)
    mode: ToolMode = request.tool_choice.mode if request.tools else "none"
    history = CallHistory.of(request.messages)
    messages, urls = take_pictures(history.messages)
    if urls and isinstance(speaker.pictures, NoVision) and not request.must_show_pictures:
        told.append(f"{len(urls)} images were left out: this server reads text only ({speaker.pictures.reason})")
        messages, urls = leave_out_pictures(messages), []
    pictures = speaker.read_pictures(urls)
    begun = request.begun_reply
    prompt = template.render(
        messages if begun is None else (*messages, _begun_turn(begun, request.begun_name)),
        tools=_declarations(request.tools) or None,
        thinking=request.thinking,
        most_tokens=most_tokens,
        keep_reasoning=bool(request.keep_reasoning),
        continue_last=begun is not None,
        effort=request.reasoning_effort,
    )
    check_reasoning(request, prompt, template, told)
    sampling = speaker.sampling(request.sampling, thinking=request.thinking)
    if mode == "none":  # without tools too: the calls of an earlier turn are no example to follow
        biases = dict(sampling.logit_bias) | dict(no_tools_bias(tokenizer))
        sampling = replace(sampling, logit_bias=tuple(biases.items()))
    prompt_ids, shown = speaker.place_pictures(prompt.ids, pictures, urls)
    ids = tuple(prompt_ids)
    form = ReplyForm(mode=mode, reasoning=prompt.reasoning, next_index=history.next_index, told=told)
    choices = []
    for index in range(request.n):
        constraint = reply_constraint(request, tokenizer, form)
        parser = OutputParser(
            tokenizer,
            reasoning_open=prompt.reasoning_open,
            tools=_callable_tools(request, mode),
            forced=mode == "required",
            stop=request.stop,
            history=history,
        )
        choices.append(
            Choice(
                request=replace(_sequence(request, index, ids, sampling, tokenizer, constraint), pictures=shown),
                decoder=ReplyDecoder(
                    parser,
                    stop_ids=tokenizer.stop_ids,
                    not_text=tokenizer.is_special,
                    one_call=bool(request.tools) and not request.tool_choice.parallel,
                ),
            )
        )
    return PreparedRequest(
        choices=tuple(choices),
        prompt_tokens=len(ids),
        choices_per_prompt=request.n,
        warnings=tuple(dict.fromkeys(told)),
    )


def _begun_turn(text: str, name: str | None) -> dict[str, Any]:
    """The assistant's message that the model goes on with."""
    return {"role": "assistant", "content": text, **({"name": name} if name else {})}


def _with_gained_tools(request: ConversationRequest, *, shown: bool, told: list[str]) -> ConversationRequest:
    """The request with the tools of its messages among those that may be called.

    Args:
        request: of the door.
        shown: whether the template declares them where they stand; else they are declared with the others.
        told: gets a sentence where they are not.
    """
    gained = [tool for message in request.messages for tool in message.get("tools") or ()]
    if not gained:
        return request
    if shown:
        return replace(request, tools=(*request.tools, *gained))
    told.append(
        "tools inside of messages are declared at the begin of the prompt: this model's template has one place for them"
    )
    messages = [
        {key: value for key, value in message.items() if key != "tools"}
        for message in request.messages
        if not message.get("tools") or message.get("content")
    ]
    return replace(request, tools=(*request.tools, *gained), messages=tuple(messages))


def _prepare_texts(request: TextRequest, speaker: Speaker, most_tokens: int | None) -> PreparedRequest:
    tokenizer = speaker.tokenizer
    prompts = [
        tuple(tokenizer.encode(each, most_tokens=most_tokens)) if isinstance(each, str) else each
        for each in request.prompts
    ]
    if not prompts or not all(prompts):
        raise RequestError("a prompt has no tokens", expected="at least one in each prompt", param="prompt")
    sampling = speaker.sampling(request.sampling)
    choices = []
    for ids in prompts:
        prefix = tokenizer.decode(ids) if request.echo else ""
        for index in range(request.n):
            parser = TextParser(tokenizer, stop=request.stop, prefix=prefix)
            sequence = _sequence(request, index, ids, sampling, tokenizer)
            choices.append(Choice(request=sequence, decoder=ReplyDecoder(parser, stop_ids=tokenizer.stop_ids)))
    return PreparedRequest(
        choices=tuple(choices),
        prompt_tokens=sum(map(len, prompts)),
        choices_per_prompt=request.n,
        warnings=request.warnings,
    )


def _sequence(
    options: ReplyOptions,
    index: int,
    ids: tuple[int, ...],
    sampling: SamplingParams,
    tokenizer: KimiTokenizer,
    constraint: TokenConstraint | None = None,
) -> GenerationRequest:
    """One reply for the engine. Each has a random stream of its own, and the whole answer is repeatable."""
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + index) % _SEED_RANGE)
    return GenerationRequest(
        request_id=uuid.uuid4().hex
        if options.request_id is None
        else options.request_id + (f"-{index}" if index else ""),
        prompt_ids=ids,
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop_ids=frozenset() if options.ignore_end else tokenizer.stop_ids,
        constraint=constraint,
        use_prefix_cache=options.use_prefix_cache,
    )


def _callable_tools(request: ConversationRequest, mode: ToolMode) -> Sequence[Mapping[str, Any]]:
    """The tools that the reply may call."""
    chosen = request.tool_choice.name if mode == "required" else None
    if mode == "none":
        return ()
    return [tool for tool in request.tools if chosen is None or (tool.get("function") or {}).get("name") == chosen]


def _declarations(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools as the model reads them; `strict` is for the server, the model was never trained on it."""
    return [
        {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}
        if isinstance(tool.get("function"), Mapping)
        else tool
        for tool in tools
    ]
