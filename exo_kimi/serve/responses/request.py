"""The body of `POST /v1/responses`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from exo_kimi.dialogue.request import JsonFormat
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.request.fields import Penalty, Probability, Temperature, TokenCount
from exo_kimi.serve.request.lenient import LenientFields, name_unknown, read_fields

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
_HONOURED_INCLUDES = {LOGPROBS, ENCRYPTED_REASONING}


class ReasoningOption(LenientFields):
    """`reasoning`. Kimi's reasoning has no summary: where one is asked for, it is the whole of it."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None

    @property
    def as_summary(self) -> bool:
        """Whether the client reads reasoning as a summary."""
        return (self.summary or self.generate_summary or "none") != "none"


class TextFormatOption(LenientFields):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOption(LenientFields):
    """`text`."""

    format: TextFormatOption | None = None
    verbosity: str | None = None


class ResponsesRequest(LenientFields):
    """The body of `POST /v1/responses`. What its items and tools may be is checked where they are read."""

    model: str | None = None
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOption | None = None
    text: TextOption | None = None
    include: list[str] | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: Any = None
    max_tool_calls: Any = None
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    service_tier: Any = None
    stream_options: Any = None
    client_metadata: Any = None

    @property
    def keeps(self) -> bool:
        """Whether the response is to be kept: OpenAI's default."""
        return self.store is not False

    def includes(self, name: str) -> bool:
        """Whether `include` asks for it."""
        return name in (self.include or ())

    def json_format(self) -> JsonFormat | None:
        """The form of the text; None is free.

        Raises:
            RequestError: a JSON schema was announced and is not there.
        """
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return JsonFormat()
        if form.schema_ is None:
            name = "text.format.schema"
            raise RequestError(f"missing required parameter: '{name}'", param=name, code="missing_required_parameter")
        return JsonFormat(schema=form.schema_)

    def thinking(self) -> bool | None:
        """Whether the model should reason first; None leaves it to the checkpoint's template."""
        effort = self.reasoning.effort if self.reasoning else None
        return False if effort == "none" else None

    def not_carried_out(self) -> list[str]:
        """A warning for everything in the body that changes nothing here although it would at OpenAI."""
        found = name_unknown(self)
        if self.truncation not in (None, "disabled"):
            found.append("'truncation' is not carried out: a prompt that does not fit is refused")
        if self.context_management is not None:
            found.append("'context_management' is not carried out: a prompt that does not fit is refused")
        others = [name[:60] for name in self.include or () if name not in _HONOURED_INCLUDES]
        if others:
            found.append(f"'include' has nothing for {', '.join(others[:8])}")
        return found


def parse_responses(body: Mapping[str, Any]) -> ResponsesRequest:
    """A request of the Responses API.

    Raises:
        RequestError: a field has the wrong type or value.
        UnsupportedError: what would be lost if it were left out: a background run, a conversation or prompt kept elsewhere.
    """
    request = read_fields(ResponsesRequest, dict(body))
    for name, asked in (
        ("background", request.background),
        ("conversation", request.conversation),
        ("prompt", request.prompt),
    ):
        if asked:
            raise UnsupportedError(
                f"'{name}' is not supported by this server",
                fix="leave it out",
                param=name,
                code="unsupported_parameter",
            )
    if request.top_logprobs and not request.includes(LOGPROBS):
        # OpenAI's client libraries send the one without the other.
        return request.model_copy(update={"include": [*(request.include or ()), LOGPROBS]})
    return request
