"""exo's task parameters as a request of the dialogue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.request import ConversationRequest, SamplingOverrides
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError


def prepare_task(task_id: str, params: Any, speaker: Speaker, *, context: int | None = None) -> PreparedRequest:
    """The one sequence of a task. Slow for long prompts: call it in a thread.

    Args:
        task_id: exo's, the id of the sequence too.
        params: exo's TextGenerationTaskParams.
        speaker: of the checkpoint.
        context: of the engine, in tokens.

    Raises:
        RequestError: a message, tool, option or picture that cannot be honoured.
        ContextLengthError: the prompt is far longer than the context.
        TemplateError: the template refuses the messages.
    """
    return prepare(conversation_of_task(task_id, params), speaker, context=context)


def conversation_of_task(task_id: str, params: Any) -> ConversationRequest:
    """A task in the dialogue's terms. A `thinking` that the template cannot carry out does no harm: exo sets it by its cards.

    Raises:
        RequestError: pictures without a place in the messages, or places without pictures.
    """
    limit = _token_limit(params.max_output_tokens)
    messages = _with_pictures(_messages(params), params.images)
    begun = _begun_reply(messages)
    return ConversationRequest(
        messages=tuple(messages if begun is None else messages[:-1]),
        tools=tuple(dict(tool) for tool in params.tools or () if _tool_name(tool)),
        thinking=_thinking(params),
        begun_reply=begun,
        sampling=SamplingOverrides.of(params, top_logprobs=(params.top_logprobs or 0) if params.logprobs else None),
        max_tokens=limit,
        stop=(params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ()),
        request_id=task_id,
        # As exo's own engine on its bench routes; without a limit, nothing else would end the reply.
        use_prefix_cache=params.use_prefix_cache or not params.bench,
        ignore_end=params.bench and limit is not None,
        warnings=tuple(_not_carried_out(params)),
    )


def _token_limit(max_output_tokens: int | None) -> int | None:
    """exo's 0 is no limit, and so are the -1 and -2 that its Ollama routes hand on."""
    return None if max_output_tokens is None or max_output_tokens < 1 else max_output_tokens


def _thinking(params: Any) -> bool | None:
    """exo's APIs set both fields, or none; an effort alone counts too."""
    if params.enable_thinking is None and params.reasoning_effort is not None:
        return bool(params.reasoning_effort != "none")
    return params.enable_thinking  # type: ignore[no-any-return]


def _not_carried_out(params: Any) -> Iterator[str]:
    """What exo hands on and our engine has no way to do, a sentence each."""
    # exo's Responses route hands on tools that are run by the server (web_search) as functions without a name.
    if any(not _tool_name(tool) for tool in params.tools or ()):
        yield "tools other than functions are left out"
    # exo itself writes "medium" where a client only asked for thinking.
    if params.reasoning_effort not in (None, "none", "medium"):
        yield f"reasoning_effort {params.reasoning_effort} is thinking without a level: Kimi thinks or does not"
    if params.repetition_context_size is not None and params.repetition_penalty not in (None, 1.0):
        yield "repetition_context_size is not carried out: the repetition penalty counts the whole prompt and answer"
    if getattr(params, "prefill_endpoint", None) is not None:  # v1.0.71 has none
        yield "prefill_endpoint is not carried out: this instance computes its prompts itself"


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str(function.get("name") or "") if isinstance(function, Mapping) else ""


def _messages(params: Any) -> list[dict[str, Any]]:
    """exo keeps chat messages whole beside the simpler fields of its other APIs."""
    if params.chat_template_messages is not None:
        return [_plain(message) for message in params.chat_template_messages]
    system = [{"role": "system", "content": str(params.instructions)}] if params.instructions else []
    return [*system, *({"role": each.role, "content": str(each.content)} for each in params.input)]


def _with_pictures(messages: list[dict[str, Any]], images: Sequence[str]) -> list[dict[str, Any]]:
    """exo keeps pictures as base64 beside the messages, which hold `{"type": "image"}` in the place of each."""
    waiting = iter(images)
    placed = 0
    shown: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, Mapping) and part.get("type") == "image":
                    placed += 1
                    data = next(waiting, None)
                    if data is None:
                        break
                    part = {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}}
                parts.append(part)
            message = {**message, "content": parts}
        shown.append(message)
    if placed != len(images):
        raise RequestError(
            "exo handed on other pictures than the messages show",
            expected=f"{placed} pictures",
            found=len(images),
            fix="send the request again; if it stays so, start exo anew",
            param="messages",
        )
    return shown


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
