"""The bodies of `POST /api/chat` and `/api/generate`, and what they mean in the dialogue's terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from exo_kimi.dialogue.request import ConversationRequest, JsonFormat, SamplingOverrides, TextRequest
from exo_kimi.errors import RequestError
from exo_kimi.serve.request.fields import Penalty, Probability, Temperature, check_stops
from exo_kimi.serve.request.lenient import LenientFields, known_effort, name_unknown
from exo_kimi.serve.request.parts import left_out_part, list_field, text_field

# They say how Ollama loads a model, or fine-tune samplers that this server does not have.
_WITHOUT_EFFECT = frozenset(
    "numa num_ctx num_batch num_gpu main_gpu low_vram f16_kv logits_all vocab_only use_mmap use_mlock embedding_only "
    "num_thread num_keep tfs_z typical_p repeat_last_n mirostat mirostat_tau mirostat_eta penalize_newline".split()
)
_NAMED = frozenset({"tfs_z", "typical_p", "mirostat"})  # of those, what changes the text at Ollama


class OllamaOptions(LenientFields):
    """`options`."""

    num_predict: int | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    def sampling(self) -> SamplingOverrides:
        """In the dialogue's terms."""
        return SamplingOverrides(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    def max_tokens(self) -> int | None:
        """`num_predict`; Ollama's -1 and -2 are no limit."""
        return self.num_predict if self.num_predict is not None and self.num_predict > 0 else None

    def stops(self) -> tuple[str, ...]:
        """Raises:
        RequestError: too many, too long or empty.
        """
        return check_stops((self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()), "options.stop")


class OllamaFields(LenientFields):
    """What both requests have."""

    model: str
    stream: bool | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    keep_alive: Any = None

    def reply_options(self) -> dict[str, Any]:
        """Fields of a `ReplyOptions` but for the warnings."""
        options = self.options or OllamaOptions()
        return {"sampling": options.sampling(), "max_tokens": options.max_tokens(), "stop": options.stops()}

    def json_format(self) -> JsonFormat | None:
        """The form of the text; None is free."""
        if not self.format:
            return None
        return JsonFormat() if self.format == "json" else JsonFormat(schema=dict(self.format))

    def thinking(self) -> bool | None:
        """Whether the model should reason first; None leaves it to the checkpoint's template."""
        return None if self.think is None else self.think not in (False, "none", "")

    def effort(self, warnings: list[str]) -> str | None:
        """How much to reason, for `think` as a level."""
        return known_effort(self.think, warnings) if isinstance(self.think, str) else None

    def not_carried_out(self) -> list[str]:
        """Warnings for fields that change nothing here."""
        extra = (self.options.model_extra if self.options else None) or {}
        found = [f"options.{name} is not carried out" for name in sorted(_NAMED & extra.keys())]
        return found + name_unknown(self, silent={f"options.{name}" for name in _WITHOUT_EFFECT})


class OllamaChatRequest(OllamaFields):
    """The body of `POST /api/chat`."""

    messages: list[Any] | None = None
    tools: list[Any] | None = None

    def conversation(self) -> ConversationRequest:
        """In the dialogue's terms.

        Raises:
            RequestError: a message or tool is malformed.
        """
        warnings = self.not_carried_out()
        return ConversationRequest(
            messages=tuple(_messages(self.messages or (), warnings)),
            must_show_pictures=False,
            tools=tuple(_tools(self.tools or ())),
            thinking=self.thinking(),
            reasoning_effort=self.effort(warnings),
            response_format=self.json_format(),
            warnings=tuple(warnings),
            **self.reply_options(),
        )


class OllamaGenerateRequest(OllamaFields):
    """The body of `POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[Any] | None = None
    images: list[Any] | None = None

    def conversation(self) -> ConversationRequest | TextRequest:
        """In the dialogue's terms; `raw` goes on with the prompt as it is."""
        warnings = self.not_carried_out()
        for name in ("suffix", "template", "context"):
            if getattr(self, name):
                warnings.append(f"'{name}' is not carried out")
        text = self.prompt or ""
        if self.raw:
            if self.images:
                text = f"{text}\n{left_out_part('image', warnings)}"
            return TextRequest(prompts=(text,), warnings=tuple(warnings), **self.reply_options())
        system = [{"role": "system", "content": self.system}] if self.system else []
        return ConversationRequest(
            messages=(*system, {"role": "user", "content": _shown(text, self.images)}),
            must_show_pictures=False,
            thinking=self.thinking(),
            reasoning_effort=self.effort(warnings),
            response_format=self.json_format(),
            warnings=tuple(warnings),
            **self.reply_options(),
        )


class OllamaShowRequest(LenientFields):
    """The body of `POST /api/show`; older clients call the model `name`."""

    model: str | None = None
    name: str | None = None


def _messages(messages: Sequence[Any], warnings: list[str]) -> list[dict[str, Any]]:
    """Ollama's calls have no ids: results belong to the calls before them in order, or by name."""
    found: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # name and id of calls without a result
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise RequestError(f"'{where}' has no role that is known", found=repr(role)[:40], param=where)
        content = message.get("content")
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        written: dict[str, Any] = {"role": role, "content": _shown(text, message.get("images"))}
        if role == "tool":
            named = [call for call in waiting if call[0] == message.get("tool_name")]
            answered = next(iter(named or waiting), ("", f"call_{index}"))
            if answered in waiting:
                waiting.remove(answered)
            written["tool_call_id"] = answered[1]
        if role == "assistant":
            if isinstance(message.get("thinking"), str) and message["thinking"]:
                written["reasoning_content"] = message["thinking"]
            calls = [
                _call(call, f"{where}.tool_calls[{place}]")
                for place, call in enumerate(list_field(message, "tool_calls", where))
            ]
            for place, call in enumerate(calls):
                call["id"] = f"call_{index}_{place}"
                waiting.append((call["function"]["name"], call["id"]))
            if calls:
                written["tool_calls"] = calls
        found.append(written)
    return found


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(
            f"'{where}' is no call", expected='{"function": {"name": ..., "arguments": ...}}', param=where
        )
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"type": "function", "function": {"name": text_field(function, "name", where), "arguments": text}}


def _tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    functions = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        where = f"tools[{index}].function"
        if not isinstance(function, Mapping):
            raise RequestError(f"'{where}' is missing", param=where, code="missing_required_parameter")
        text_field(function, "name", where)
        kept = {key: value for key, value in function.items() if value is not None}
        functions.append({"type": "function", "function": kept})
    return functions


def _shown(text: str, images: object) -> str | list[dict[str, Any]]:
    """A message's text with its pictures behind it, which Ollama's clients send as base64."""
    if not isinstance(images, list) or not images:
        return text
    shown = [{"type": "image_url", "image_url": {"url": f"data:;base64,{image}"}} for image in images]
    return [*([{"type": "text", "text": text}] if text else []), *shown]
