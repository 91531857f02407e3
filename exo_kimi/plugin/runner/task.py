"""From the parameters of an exo task to the sequence to generate; it knows exo's field names and nothing else of exo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exo_kimi.chat.constraint import strict_tools
from exo_kimi.chat.output import OutputParser
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import UnsupportedError
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A task as the engine takes it, and the parser of its reply."""

    request: GenerationRequest
    parser: OutputParser


def prepare_task(task_id: str, params: Any, speaker: Speaker) -> Prepared:
    """Render and encode a task. Slow for long prompts: call it in a thread.

    Args:
        task_id: exo's, the id of the request too.
        params: exo's TextGenerationTaskParams.
        speaker: of the checkpoint.

    Raises:
        RequestError: a message, tool or option that cannot be honoured; images are not.
        TemplateError: the template refuses the messages.
    """
    if params.images:
        raise UnsupportedError("images are not supported", expected="text", param="messages")
    messages = _messages(params)
    tools = [dict(tool) for tool in params.tools or ()]
    begun = _begun_reply(messages)
    if begun is not None:
        messages = messages[:-1]
    prompt = speaker.template.render(messages, tools=_declarations(tools) or None, thinking=params.enable_thinking)
    ids = (*prompt.ids, *speaker.tokenizer.encode(begun or ""))
    stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    return Prepared(
        request=GenerationRequest(
            request_id=task_id,
            prompt_ids=ids,
            max_tokens=params.max_output_tokens,
            sampling=_sampling(params, speaker),
            stop_ids=speaker.tokenizer.stop_ids,
            constraint=strict_tools(speaker.tokenizer, tools) if tools else None,
        ),
        parser=OutputParser(
            speaker.tokenizer,
            reasoning_open=prompt.reasoning_open and begun is None,
            tools=tools,
            stop=stop,
            next_call_index=sum(len(message.get("tool_calls") or ()) for message in messages),
        ),
    )


def _messages(params: Any) -> list[dict[str, Any]]:
    """exo keeps chat messages whole beside the simpler fields of its other APIs."""
    if params.chat_template_messages is not None:
        return [_plain(message) for message in params.chat_template_messages]
    system = [{"role": "system", "content": str(params.instructions)}] if params.instructions else []
    return [*system, *({"role": each.role, "content": str(each.content)} for each in params.input)]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """exo writes a call's id into its function too, which no template knows."""
    kept = dict(message)
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [
            {**call, "function": {key: value for key, value in call["function"].items() if key != "id"}}
            for call in calls
        ]
    return kept


def _begun_reply(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of a last message of the assistant, which exo has the model go on with."""
    last = messages[-1] if messages else {}
    text = last.get("content")
    if last.get("role") != "assistant" or last.get("tool_calls") or not isinstance(text, str):
        return None
    return text


def _declarations(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools as the model reads them: `strict` is for the server."""
    return [
        {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}
        if isinstance(tool.get("function"), Mapping)
        else dict(tool)
        for tool in tools
    ]


def _sampling(params: Any, speaker: Speaker) -> SamplingParams:
    """What the client or exo's card chose over what the checkpoint recommends."""
    recommended = speaker.defaults.sampling(params.enable_thinking)
    chosen = {name: value for name in _SAMPLING if (value := getattr(params, name)) is not None}
    base = SamplingParams(
        temperature=recommended.temperature,
        top_p=recommended.top_p,
        logprobs=bool(params.logprobs),
        top_logprobs=params.top_logprobs or 0 if params.logprobs else 0,
    )
    return replace(base, **chosen)
