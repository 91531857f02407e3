"""From a validated request to the sequences that the engine generates; it knows nothing of HTTP.

A prompt is rendered once; each of its `n` choices has a seed, a decoder and a grammar of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exo_kimi.chat.constraint import no_tools_bias
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.template import Prompt
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.decoding import ChatDecoder, TextDecoder
from exo_kimi.dialogue.pieces import Choice
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.serve.request.fields import GenerationFields
from exo_kimi.serve.request.grammar import constraint_factory
from exo_kimi.serve.request.messages import count_tool_calls, template_messages
from exo_kimi.serve.request.schemas import ChatRequest, CompletionRequest
from exo_kimi.serve.request.tools import plan_tools

DEFAULT_TEXT_TOKENS = 16  # OpenAI's documented default for text completions; chat has none
MAX_SEQUENCES = 128
_SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The sequences of one request, by choice index."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    choices_per_prompt: int


def prepare_chat(request: ChatRequest, speaker: Speaker) -> Prepared:
    """Renders the prompt once and makes `n` sequences of it. Slow for long prompts: call it in a thread.

    Raises:
        RequestError: a message, tool or option that cannot be honoured.
        TemplateError: the template refuses the messages.
    """
    plan = plan_tools(request)
    stops = request.stops()
    limit = request.token_limit()
    thinking = request.wants_thinking()
    prompt = speaker.template.render(
        template_messages(request.messages), tools=list(plan.tools) or None, thinking=thinking
    )
    _check_thinking(thinking, prompt)
    constraint = constraint_factory(request, plan, speaker.tokenizer, reasoning=prompt.reasoning)
    sampling = _sampling(request, speaker, thinking=thinking)
    if plan.tools and plan.mode == "none":
        biases = dict(sampling.logit_bias) | dict(no_tools_bias(speaker.tokenizer))
        sampling = replace(sampling, logit_bias=tuple(biases.items()))
    if request.logprobs:
        sampling = replace(sampling, logprobs=True, top_logprobs=request.top_logprobs or 0)
    first_call = count_tool_calls(request.messages)
    choices = []
    for index in range(request.n or 1):
        parser = OutputParser(
            speaker.tokenizer,
            reasoning_open=prompt.reasoning_open,
            tools=plan.tools if plan.mode != "none" else (),
            stop=stops,
            next_call_index=first_call,
        )
        choices.append(
            Choice(
                request=GenerationRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=tuple(prompt.ids),
                    max_tokens=limit,
                    sampling=_seeded(sampling, index),
                    stop_ids=speaker.tokenizer.stop_ids,
                    constraint=constraint(),
                ),
                decoder=ChatDecoder(parser, speaker.tokenizer, one_call=not plan.parallel),
            )
        )
    return Prepared(choices=tuple(choices), prompt_tokens=len(prompt.ids), choices_per_prompt=len(choices))


def prepare_completion(request: CompletionRequest, speaker: Speaker) -> Prepared:
    """Makes `n` sequences of every prompt. Slow for long prompts: call it in a thread.

    Raises:
        RequestError: an empty prompt, or an option that cannot be honoured.
    """
    prompts = _prompts(request.prompt, speaker.tokenizer)
    per_prompt = request.n or 1
    if len(prompts) * per_prompt > MAX_SEQUENCES:
        raise RequestError(
            "too many prompts", expected=f"{MAX_SEQUENCES} choices", found=len(prompts) * per_prompt, param="prompt"
        )
    stops = request.stops()
    sampling = _sampling(request, speaker, thinking=None)
    if request.logprobs is not None:
        sampling = replace(sampling, logprobs=True, top_logprobs=request.logprobs)
    choices = [
        Choice(
            request=GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_ids=tuple(ids),
                max_tokens=request.max_tokens or DEFAULT_TEXT_TOKENS,
                sampling=_seeded(sampling, index),
                stop_ids=speaker.tokenizer.stop_ids,
            ),
            decoder=TextDecoder(
                speaker.tokenizer, stops=stops, prefix=speaker.tokenizer.decode(ids) if request.echo else ""
            ),
        )
        for ids in prompts
        for index in range(per_prompt)
    ]
    return Prepared(
        choices=tuple(choices), prompt_tokens=sum(len(ids) for ids in prompts), choices_per_prompt=per_prompt
    )


def _check_thinking(thinking: bool | None, prompt: Prompt) -> None:
    """A wish about reasoning that the checkpoint's template cannot carry out is refused, not ignored."""
    if thinking is None or thinking == (prompt.reasoning != "none"):
        return
    raise UnsupportedError(
        "this model does not reason" if thinking else "this model's reasoning cannot be turned off",
        fix="leave 'thinking' and 'reasoning_effort' out",
        param="thinking",
        code="unsupported_value",
    )


def _prompts(prompt: str | Sequence[Any], tokenizer: KimiTokenizer) -> list[list[int]]:
    """Token ids of each prompt of a text completion."""
    if isinstance(prompt, str):
        prompts = [tokenizer.encode(prompt)]
    else:
        items = [list(prompt)] if prompt and isinstance(prompt[0], int) else prompt
        prompts = [tokenizer.encode(item) if isinstance(item, str) else list(item) for item in items]
    if not prompts or not all(prompts):
        raise RequestError("a prompt has no tokens", expected="at least one in each prompt", param="prompt")
    return prompts


def _sampling(request: GenerationFields, speaker: Speaker, *, thinking: bool | None) -> SamplingParams:
    """What the client chose over what the checkpoint recommends."""
    recommended = speaker.defaults.sampling(thinking)
    chosen: Mapping[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
        )
        if (value := getattr(request, name)) is not None
    }
    biases = request.biases(speaker.tokenizer.vocab_size)
    base = SamplingParams(temperature=recommended.temperature, top_p=recommended.top_p, logit_bias=biases)
    return replace(base, **chosen)


def _seeded(sampling: SamplingParams, index: int) -> SamplingParams:
    """Each choice has a random stream of its own, and the whole answer is repeatable."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % _SEED_RANGE)
