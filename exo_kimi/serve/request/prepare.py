"""OpenAI's chat and text completions as requests of the dialogue."""

from __future__ import annotations

from typing import Any

from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.request import ConversationRequest, JsonFormat, SamplingOverrides, TextRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError
from exo_kimi.serve.request.messages import template_messages
from exo_kimi.serve.request.schemas import ChatRequest, CompletionRequest, ResponseFormat
from exo_kimi.serve.request.tools import choose_tools

DEFAULT_TEXT_TOKENS = 16  # OpenAI's documented default for text completions; chat has none
MAX_SEQUENCES = 128


def prepare_chat(request: ChatRequest, speaker: Speaker, *, context: int | None = None) -> PreparedRequest:
    """The sequences of a chat request. Slow for long prompts: call it in a thread. Arguments as `dialogue.prepare`.

    Raises:
        RequestError: a message, tool or option that cannot be honoured.
        ContextLengthError: far more tokens than the context holds.
        TemplateError: the template refuses the messages.
    """
    return prepare(conversation_of(request, vocab_size=speaker.tokenizer.vocab_size), speaker, context=context)


def prepare_completion(request: CompletionRequest, speaker: Speaker, *, context: int | None = None) -> PreparedRequest:
    """The sequences of a text completion request. Slow for long prompts: call it in a thread. Arguments as `dialogue.prepare`.

    Raises:
        RequestError: an empty prompt, or an option that cannot be honoured.
        ContextLengthError: far more tokens than the context holds.
    """
    return prepare(texts_of(request, vocab_size=speaker.tokenizer.vocab_size), speaker, context=context)


def conversation_of(request: ChatRequest, *, vocab_size: int) -> ConversationRequest:
    """A chat request in the dialogue's terms.

    Raises:
        RequestError: a message, tool or option that cannot be honoured.
    """
    choice = choose_tools(request)
    # A call that must be made leaves no text for a format to say anything about.
    form = request.response_format if choice.mode != "required" else None
    messages = template_messages(request.messages)
    begun = messages.pop() if request.messages[-1].partial else None
    return ConversationRequest(
        messages=tuple(messages),
        begun_reply=None if begun is None else begun["content"] or "",
        begun_name=None if begun is None else begun.get("name"),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in request.tools or ()),
        tool_choice=choice,
        thinking=request.wants_thinking(),
        keep_reasoning=request.keeps_reasoning,
        reasoning_budget=request.reasoning_budget,
        reasoning_effort=request.level,
        exact=request.exact,
        warnings=request.warnings,
        response_format=_json_format(form),
        sampling=SamplingOverrides.of(
            request,
            logit_bias=request.biases(vocab_size),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ),
        max_tokens=request.token_limit(),
        stop=request.stops(),
        n=request.n or 1,
    )


def texts_of(request: CompletionRequest, *, vocab_size: int) -> TextRequest:
    """A text completion request in the dialogue's terms.

    Raises:
        RequestError: too many prompts, or an option that cannot be honoured.
    """
    prompts = _prompts(request.prompt)
    count = len(prompts) * (request.n or 1)
    if count > MAX_SEQUENCES:
        raise RequestError("too many prompts", expected=f"{MAX_SEQUENCES} choices", found=count, param="prompt")
    return TextRequest(
        warnings=request.warnings,
        prompts=prompts,
        echo=bool(request.echo),
        sampling=SamplingOverrides.of(request, logit_bias=request.biases(vocab_size), top_logprobs=request.logprobs),
        max_tokens=request.max_tokens or DEFAULT_TEXT_TOKENS,
        stop=request.stops(),
        n=request.n or 1,
    )


def _prompts(prompt: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    """One text, several, one list of token ids, or several of them."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(each if isinstance(each, str) else tuple(each) for each in prompt)


def _json_format(form: ResponseFormat | None) -> JsonFormat | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return JsonFormat()
    param, schema = "response_format.json_schema", None
    if form.json_schema is not None:
        param, schema = f"{param}.schema", form.json_schema.schema_
    if schema is None:
        raise RequestError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    return JsonFormat(schema=schema)
