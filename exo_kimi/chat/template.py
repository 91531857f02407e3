"""From messages to a prompt, through the checkpoint's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from exo_kimi.chat.family import THINK_CLOSE, THINK_OPEN, Family, family_of
from exo_kimi.chat.guard import TextGuard
from exo_kimi.chat.messages import template_messages
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tokenizer_files import CONFIG_FILE, read_json_object, read_model_config
from exo_kimi.chat.tool_declarations import Undeclarable, declare_tools, sorted_deep
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.errors import TemplateError

TEMPLATE_FILE = "chat_template.jinja"
TURN_END = "<|im_end|>"
_MESSAGE_TOOLS = re.compile(r"""\b(?:message|msg|turn|m)(?:\.tools\b|\[['"]tools['"]\]|\.get\(['"]tools['"])""")
ReasoningMode = Literal["open", "may_open", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A rendered conversation.

    Args:
        ids: token ids, at least one.
        text: the same as text, control tokens by their names.
        reasoning: whether the reply begins inside reasoning ("open": the prompt ends with `<think>`), may begin with it
            ("may_open": the model writes `<think>` itself), or not ("none": closed by the prompt, or no think tags).
    """

    ids: list[int]
    text: str
    reasoning: ReasoningMode

    @property
    def reasoning_open(self) -> bool:
        """Whether the first generated token is already reasoning."""
        return self.reasoning == "open"


class ChatTemplate:
    """The chat template of a checkpoint.

    Args:
        tokenizer: encodes what is rendered.
        template: used for every conversation.
        tools_template: used instead when there are tools (Hugging Face's "tool_use"), when the checkpoint has one.
    """

    def __init__(
        self, tokenizer: KimiTokenizer, template: CompiledTemplate, tools_template: CompiledTemplate | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._tools_template = tools_template or template

    @classmethod
    def from_directory(
        cls, path: Path | str, tokenizer: KimiTokenizer, *, raw_config: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """Read chat_template.jinja, else the one in tokenizer_config.json, else take the built-in one of the family.

        `raw_config` is config.json, where that was read already.

        Raises:
            TemplateError: the template does not compile.
            TokenizerError: tokenizer_config.json or config.json is malformed.
        """
        directory = Path(path)
        file = directory / TEMPLATE_FILE
        try:
            return cls(tokenizer, CompiledTemplate(read_text(file), str(file)))
        except FileNotFoundError:
            pass  # the older places follow
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError("the chat template cannot be read", found=error, where=file) from error
        stated = read_json_object(directory / CONFIG_FILE, required=False).get("chat_template")
        where = f"{directory / CONFIG_FILE}, chat_template"
        if isinstance(stated, str):
            return cls(tokenizer, CompiledTemplate(stated, where))
        if stated is not None:
            named = _named_templates(stated, where)
            tools = named.get("tool_use")
            return cls(
                tokenizer,
                CompiledTemplate(named["default"], f"{where}, default"),
                None if tools is None else CompiledTemplate(tools, f"{where}, tool_use"),
            )
        config = read_model_config(directory) if raw_config is None else raw_config
        return cls.built_in(family_of(config, tokenizer), tokenizer)

    @classmethod
    def built_in(cls, family: Family, tokenizer: KimiTokenizer) -> ChatTemplate:
        """Our own template for checkpoints that carry none."""
        folder = resources.files("exo_kimi.chat").joinpath("templates")
        source = "".join(
            folder.joinpath(name).read_text(encoding="utf-8") for name in ("macros.jinja", f"{family}.jinja")
        )
        return cls(tokenizer, CompiledTemplate(source, f"built-in {family} template"))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        most_tokens: int | None = None,
        keep_reasoning: bool = False,
        continue_last: bool = False,
        effort: str | None = None,
    ) -> Prompt:
        """Render and encode a conversation.

        Args:
            messages: OpenAI-shaped; content is a string, a list of text parts, or None.
            tools: OpenAI-shaped function tools.
            thinking: handed to the template as `thinking`; None leaves the variable undefined.
            add_generation_prompt: end where the assistant's reply begins.
            most_tokens: give up where the prompt has more; None never does.
            keep_reasoning: show the reasoning of all earlier turns, where `keeps_reasoning` says that the template can.
            effort: handed to the template as `thinking_effort` and `reasoning_effort`; None leaves both undefined.
            continue_last: end inside the last message, an assistant's, in place of a reply's begin.

        Raises:
            ContextLengthError: the prompt has more tokens than that.
            RequestError: a message that no text template can take (an image, a role that is not a string).
            TemplateError: the template failed on these messages, with its line.
        """
        template = self._tools_template if tools else self._template
        # K2.5 and later declare tools sorted and as TypeScript, computed outside of the template.
        as_typescript = bool(tools) and "tools_ts_str" in template.source
        declared: list[Any] | None = list(tools) if tools else None
        try:
            if as_typescript:
                declared = sorted_deep(declared)
            prepared = template_messages(messages)
            guard = TextGuard(self._tokenizer.special, (prepared, declared))
            variables: dict[str, Any] = {
                "messages": guard.hide(prepared),
                "tools": guard.hide(declared),
                "add_generation_prompt": add_generation_prompt and not continue_last,
                "preserve_thinking": keep_reasoning,  # K2.6's name; False is the default of its own tokenizer class
                **self._tokenizer.named_tokens,
            }
            if thinking is not None:
                variables["thinking"] = thinking
            if effort is not None:
                variables["thinking_effort"] = variables["reasoning_effort"] = effort
            if declared and as_typescript and (text := _typescript(declared)):
                variables["tools_ts_str"] = guard.hide(text)
        except RecursionError as error:
            raise TemplateError("the messages or tools are nested too deep", where=template.where) from error
        rendered = template.render(variables)
        ids: list[int] = []
        for part in guard.split(rendered):
            left = None if most_tokens is None else max(0, most_tokens - len(ids))
            ids += [part] if isinstance(part, int) else self._tokenizer.encode(part, most_tokens=left)
        if not ids:
            raise TemplateError("the chat template rendered nothing", where=template.where)
        if continue_last:
            turn_end = self._last_turn_end(ids, template)
            text = guard.show(rendered)
            return Prompt(ids=ids[:turn_end], text=text[: text.rfind(TURN_END)], reasoning="none")
        return Prompt(ids=ids, text=guard.show(rendered), reasoning=self._reasoning(ids, template))

    @property
    def keeps_reasoning(self) -> bool:
        """Whether the template can show the reasoning of all earlier turns (K2.6 and later)."""
        return "preserve_thinking" in self._template.source

    @property
    def reads_effort(self) -> bool:
        """Whether the template tells the model how much to reason."""
        return "thinking_effort" in self._template.source or "reasoning_effort" in self._template.source

    @property
    def shows_message_tools(self) -> bool:
        """Whether the template declares tools that stand in a message, where it stands."""
        return _MESSAGE_TOOLS.search(self._template.source) is not None

    def _last_turn_end(self, ids: Sequence[int], template: CompiledTemplate) -> int:
        """Where the end of the last turn stands; nothing but blanks follows it."""
        end_id = self._tokenizer.special.get(TURN_END)
        for at in range(len(ids) - 1, -1, -1):
            if self._tokenizer.is_special(ids[at]):
                if ids[at] == end_id:
                    return at
                break
        raise TemplateError("the chat template cannot go on with a begun reply", where=template.where)

    def _reasoning(self, ids: Sequence[int], template: CompiledTemplate) -> ReasoningMode:
        """How the prompt leaves the think tags, looking back to where the last turn began."""
        special = self._tokenizer.special
        opened, closed = special.get(THINK_OPEN), special.get(THINK_CLOSE)
        if opened is None or closed is None:
            return "none"
        for token_id in reversed(ids):
            if token_id == opened:
                return "open"
            if token_id == closed:
                return "none"
            if self._tokenizer.is_special(token_id):
                break
        # Who never shows the model its own reasoning has a model that does not reason.
        return "may_open" if THINK_OPEN in template.source else "none"


def _typescript(tools: list[Any]) -> str:
    try:
        return declare_tools(tools)
    except (Undeclarable, TypeError, AttributeError, KeyError):
        return ""  # the template then declares them as JSON, as the original does for such schemas


def _named_templates(stated: object, where: str) -> dict[str, str]:
    """`[{"name": ..., "template": ...}]` or `{name: template}`, the two forms of several templates."""
    items: list[tuple[object, object]] = list(stated.items()) if isinstance(stated, dict) else []
    if isinstance(stated, list):
        items = [(item.get("name"), item.get("template")) for item in stated if isinstance(item, dict)]
    named = {name: source for name, source in items if isinstance(name, str) and isinstance(source, str)}
    if "default" not in named:
        raise TemplateError(
            "tokenizer_config.json has no usable chat template",
            expected='a string, or named templates with one called "default"',
            found=type(stated).__name__,
            where=where,
        )
    return named
