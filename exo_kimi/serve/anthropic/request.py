"""The body of `POST /v1/messages`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from exo_kimi.dialogue.request import JsonFormat
from exo_kimi.errors import UnsupportedError
from exo_kimi.serve.request.fields import Probability, TokenCount, check_stops
from exo_kimi.serve.request.lenient import LenientFields, known_effort, name_unknown, read_fields


class ThinkingConfig(LenientFields):
    """`thinking`."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: TokenCount | None = None
    display: str | None = None


class OutputFormat(LenientFields):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(LenientFields):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(LenientFields):
    """The body of `POST /v1/messages/count_tokens`. What blocks and tools may be is checked where they are read."""

    model: str | None = None
    messages: Annotated[list[Any], Field(min_length=1)]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: Any = None
    context_management: Any = None
    mcp_servers: Any = None

    def thinks(self) -> bool | None:
        """Whether the model should reason first; None leaves it to the checkpoint's template."""
        if self.thinking is None or self.thinking.type == "adaptive":
            return None
        return self.thinking.type == "enabled"

    def budget(self) -> int | None:
        """Most tokens of reasoning; None sets no limit."""
        return self.thinking.budget_tokens if self.thinking else None

    def effort(self, warnings: list[str]) -> str | None:
        """How much to reason; None leaves it to the model."""
        return known_effort(self.output_config.effort if self.output_config else None, warnings)

    def keeps_thinking(self) -> bool | None:
        """Whether the model is to see the thinking of all its earlier turns; None leaves it to the template."""
        return True if any(edit.get("keep") == "all" for edit in self._edits() if isinstance(edit, Mapping)) else None

    def _edits(self) -> list[Any]:
        edits = self.context_management.get("edits") if isinstance(self.context_management, Mapping) else None
        return edits if isinstance(edits, list) else []

    def json_format(self) -> JsonFormat | None:
        """The form of the text; None is free."""
        form = self.output_format or (self.output_config.format if self.output_config else None)
        return None if form is None else JsonFormat(schema=form.schema_)

    def not_carried_out(self) -> list[str]:
        """A warning for everything in the body that changes nothing here although it would at Anthropic."""
        found = name_unknown(self)
        if self.mcp_servers:
            found.append("'mcp_servers' is not carried out: this server calls no others")
        for edit in self._edits():
            if not isinstance(edit, Mapping) or edit.get("keep") != "all":
                kind = str(edit.get("type") if isinstance(edit, Mapping) else edit)[:60]
                found.append(f"'context_management' is not carried out: {kind}")
        return found


class MessagesRequest(CountRequest):
    """The body of `POST /v1/messages`."""

    max_tokens: TokenCount
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Probability | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None
    speed: Any = None
    diagnostics: Any = None

    def stops(self) -> tuple[str, ...]:
        """The stop sequences; ones of white space alone are taken, as everywhere here.

        Raises:
            RequestError: an empty one, one over 4096 bytes, or more than 16.
        """
        return check_stops(tuple(self.stop_sequences or ()), "stop_sequences")


def parse_messages(body: Mapping[str, Any]) -> MessagesRequest:
    """A request of the Messages API.

    Raises:
        RequestError: a field is missing, or has the wrong type or value.
        UnsupportedError: a container, whose files would be lost.
    """
    request = read_fields(MessagesRequest, dict(body))
    if request.container:
        raise UnsupportedError(
            "'container' is not supported by this server",
            fix="leave it out",
            param="container",
            code="unsupported_parameter",
        )
    return request


def parse_count(body: Mapping[str, Any]) -> CountRequest:
    """A request for the number of tokens.

    Raises:
        RequestError: a field is missing, or has the wrong type or value.
    """
    return read_fields(CountRequest, dict(body))
