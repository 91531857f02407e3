"""What a client may write in a chat or text completion; anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.problems import from_validation
from exo_kimi.serve.request.fields import Fields, FirstOnly, GenerationFields, TokenCount, take_known

TOOL_NAME = r"^[a-zA-Z0-9_.:\-]{1,64}$"

Texts = Annotated[list[str], FirstOnly()]
TokenIds = Annotated[list[int], FirstOnly()]

UNSUPPORTED_CHAT = frozenset(
    {
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "verbosity",
        "web_search_options",
    }
)
UNSUPPORTED_TEXT = frozenset({"suffix"})

Schema = TypeVar("Schema", bound=Fields)


class FunctionCall(Fields):
    """The function of an earlier tool call."""

    name: str
    arguments: str


class ToolCall(Fields):
    """An earlier tool call, as this server or another one returned it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Fields):
    """One message of any role; what a role needs and forbids is checked in `messages`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], FirstOnly()] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FirstOnly()] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Fields):
    """A function that the model may call. `strict` asks that its arguments always obey `parameters`."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class JsonSchema(Fields):
    """`response_format.json_schema`."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ThinkingOption(Fields):
    """`thinking` as Moonshot's API writes it."""

    type: Literal["enabled", "disabled"]


class TemplateArguments(Fields):
    """`chat_template_kwargs`: the one argument that Kimi's templates take."""

    thinking: bool | None = None


class ChatRequest(GenerationFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1), FirstOnly()]
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[Tool], FirstOnly()] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    thinking: bool | ThinkingOption | None = None
    chat_template_kwargs: TemplateArguments | None = None

    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name.

        Raises:
            RequestError: both were given and differ.
        """
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "'max_tokens' and 'max_completion_tokens' differ",
                found=f"{self.max_tokens} and {self.max_completion_tokens}",
                fix="send max_completion_tokens only",
                param="max_completion_tokens",
            )
        return self.max_completion_tokens or self.max_tokens

    def wants_thinking(self) -> bool | None:
        """Whether the model should reason first; None leaves it to the checkpoint's template.

        Raises:
            UnsupportedError: a reasoning effort between none and the model's own.
            RequestError: the ways to ask for it contradict each other.
        """
        wishes: dict[str, bool] = {}
        if self.reasoning_effort is not None:
            if self.reasoning_effort != "none":
                raise UnsupportedError(
                    "'reasoning_effort' is not supported with this value",
                    expected="'none': Kimi thinks or does not, without levels between",
                    found=repr(self.reasoning_effort[:40]),
                    fix="leave it out, or send 'none'",
                    param="reasoning_effort",
                    code="unsupported_value",
                )
            wishes["reasoning_effort"] = False
        if self.thinking is not None:
            on = self.thinking if isinstance(self.thinking, bool) else self.thinking.type == "enabled"
            wishes["thinking"] = on
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking is not None:
            wishes["chat_template_kwargs"] = self.chat_template_kwargs.thinking
        if len(set(wishes.values())) > 1:
            names = " and ".join(f"'{name}'" for name in wishes)
            raise RequestError(f"{names} contradict each other", param=next(iter(wishes)))
        return next(iter(wishes.values()), None)


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], FirstOnly()]
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """A chat request.

    Raises:
        RequestError: a field that is missing, unknown, unsupported, or has the wrong type or value.
    """
    request = _validate(ChatRequest, take_known(body, ChatRequest.model_fields, UNSUPPORTED_CHAT))
    request.check_stream_options()
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs")
    return request


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """A text completion request.

    Raises:
        RequestError: as `parse_chat`.
    """
    request = _validate(CompletionRequest, take_known(body, CompletionRequest.model_fields, UNSUPPORTED_TEXT))
    request.check_stream_options()
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise UnsupportedError(
            "'best_of' is only supported when it equals 'n'", found=request.best_of, param="best_of", code="unsupported"
        )
    if request.echo and request.logprobs is not None:
        raise UnsupportedError(
            "log-probabilities of the prompt are not supported",
            fix="send 'echo' or 'logprobs', not both",
            param="echo",
            code="unsupported",
        )
    return request


def _validate(schema: type[Schema], body: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise from_validation(error, body) from None
