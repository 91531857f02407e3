"""What a client may write in a chat or text completion; anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, ValidationError

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.problems import from_validation
from exo_kimi.serve.request.accept import AcceptedChat, accept_fields, left_out_warning
from exo_kimi.serve.request.fields import Fields, FirstOnly, GenerationFields, TokenCount, take_known

TOOL_NAME = r"^[a-zA-Z0-9_.:/\-]{1,128}$"
GAINED_TOOL_NAME = r"^[a-zA-Z_][a-zA-Z0-9_.:/\-]{0,127}$"  # Moonshot's rule for tools inside of messages

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


class GainedFunction(Function):
    """A function that the conversation gains on the way."""

    name: Annotated[str, Field(pattern=GAINED_TOOL_NAME)]


class GainedTool(Fields):
    """One entry of a system message's `tools`."""

    type: Literal["function"]
    function: GainedFunction


class Message(Fields):
    """One message of any role; what a role needs and forbids is checked in `messages`.

    `partial`, on a last message of the assistant, has the model go on with it. `tools`, on a system message without text, are
    tools that the conversation gains there. Both are Moonshot's.
    """

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
    partial: bool | None = None
    tools: Annotated[list[GainedTool], FirstOnly()] | None = None


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
    """`thinking` as Moonshot's and Anthropic's APIs write it.

    `budget_tokens` caps the reasoning; `keep` "all" shows the model the reasoning of all its earlier turns; `effort` is for
    templates that read one, and a cap elsewhere.
    """

    type: Literal["enabled", "disabled"] | None = None
    budget_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    keep: Literal["all"] | None = None
    effort: str | None = None


class TemplateArguments(Fields):
    """`chat_template_kwargs`: the arguments that Kimi's templates take."""

    thinking: bool | None = None
    preserve_thinking: bool | None = None


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
    _warnings: tuple[str, ...] = PrivateAttr(default=())
    _exact: bool = PrivateAttr(default=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request is not carried out."""
        return self._warnings

    @property
    def exact(self) -> bool:
        """Whether what cannot be carried out as it is asked must be refused."""
        return self._exact

    @property
    def keeps_reasoning(self) -> bool | None:
        """Whether the model is to see the reasoning of all its earlier turns; None leaves it to the template."""
        if isinstance(self.thinking, ThinkingOption) and self.thinking.keep is not None:
            return True
        return self.chat_template_kwargs.preserve_thinking if self.chat_template_kwargs is not None else None

    @property
    def level(self) -> str | None:
        """How much the model is to reason."""
        return self.thinking.effort if isinstance(self.thinking, ThinkingOption) else None

    @property
    def reasoning_budget(self) -> int | None:
        """Most tokens of reasoning."""
        return self.thinking.budget_tokens if isinstance(self.thinking, ThinkingOption) else None

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
        if isinstance(self.thinking, bool):
            wishes["thinking"] = self.thinking
        elif self.thinking is not None and self.thinking.type is not None:
            wishes["thinking"] = self.thinking.type == "enabled"
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
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request is not carried out."""
        return self._warnings


def parse_chat(body: dict[str, Any], *, strict: bool = False) -> ChatRequest:
    """A chat request.

    Args:
        body: the parsed JSON.
        strict: refuse what cannot be carried out, rather than leave it out and name it (`accept`).

    Raises:
        RequestError: a field that is missing, unknown, unsupported, or has the wrong type or value.
    """
    told: list[str] = []
    if not strict:
        accepted = AcceptedChat(body)
        body, told = accepted.body, accepted.told
    request = _validate(ChatRequest, take_known(body, ChatRequest.model_fields, UNSUPPORTED_CHAT))
    request._warnings, request._exact = tuple(told), strict
    request.check_stream_options()
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs")
    return request


def parse_completion(body: dict[str, Any], *, strict: bool = False) -> CompletionRequest:
    """A text completion request; the arguments are those of `parse_chat`.

    Raises:
        RequestError: as `parse_chat`.
    """
    left_out: list[str] = []
    if not strict:
        body, left_out = accept_fields(body)
    request = _validate(CompletionRequest, take_known(body, CompletionRequest.model_fields, UNSUPPORTED_TEXT))
    request._warnings = tuple(left_out_warning(left_out))
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
