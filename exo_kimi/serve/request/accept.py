"""Chat requests as agents really send them: what this server cannot carry out is left out and named, never a refusal.

A history is never refused either: it is what it is, and a client that gets a 400 for it gets one for ever. With `--strict-api`
none of this runs, and every field that would be named here is a 400.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from exo_kimi.dialogue.pictures import PICTURE_KINDS
from exo_kimi.dialogue.reasoning import EFFORT_BUDGETS

# Documented by OpenAI or by agents, without effect on a Kimi: taken with any value, and named when that asks for something.
WITHOUT_EFFECT = frozenset(
    {
        "cache_control",
        "modalities",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
        "verbosity",
    }
)
_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
# Options of other servers (llama.cpp, Ollama, vLLM, SGLang, TGI, OpenRouter, LiteLLM).
OF_OTHER_SERVERS = frozenset(
    """
    add_generation_prompt add_special_tokens allowed_openai_params cache_prompt cache_salt detokenize documents
    draft_model drop_params dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dry_sequence_breakers
    dynatemp_exponent dynatemp_range early_stopping format id_slot ignore_eos include_reasoning
    include_stop_str_in_output keep_alive length_penalty lora min_keep min_tokens mirostat mirostat_eta mirostat_tau
    models n_discard n_keep n_predict n_probs num_batch num_ctx num_draft_tokens num_gpu num_keep num_predict
    num_retries num_thread options parse_tool_calls penalize_nl penalty_alpha plugins post_sampling_probs priority
    provider prompt_logprobs raw reasoning_format reasoning_in_content repeat_last_n repeat_penalty request_timeout
    return_progress return_token_ids return_tokens route safe_prompt samplers separate_reasoning session_id
    skip_special_tokens slot_id spaces_between_special_tokens stop_token_ids stream_reasoning t_max_predict_ms
    template tfs_z timeout timings_per_token top_a top_n_sigma transforms truncate truncate_prompt_tokens typical_p
    usage use_beam_search xtc_probability xtc_threshold
    """.split()
)
_THINKING_FIELDS = (
    "thinking",
    "chat_template_kwargs",
    "enable_thinking",
    "think",
    "reasoning",
    "reasoning_effort",
    "thinking_budget",
    "thinking_token_budget",
)
_ON = frozenset({"enabled", "enable", "adaptive", "auto", "on", "true", "yes", "1"})
_OFF = frozenset({"disabled", "disable", "none", "off", "false", "no", "0"})
_MESSAGE_FIELDS = frozenset(
    "role content name tool_calls tool_call_id reasoning_content refusal annotations audio function_call partial tools".split()
)
_CALL_FIELDS = frozenset({"id", "type", "function", "index"})
_PART_FIELDS = frozenset({"type", "annotations", "prompt_cache_breakpoint"})
_MAX_NAMED = 12
_UNNAMED = frozenset({"cache_control"})  # documented as a hint: the cache here needs none


def accept_fields(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of any generation request without those that have no effect here, and the names of what was left out."""
    kept = {name: value for name, value in body.items() if value is not None}
    left_out: list[str] = []
    for name in [name for name in kept if name in WITHOUT_EFFECT or name in OF_OTHER_SERVERS]:
        value = kept.pop(name)
        if value not in _DEFAULTS.get(name, ()) and name not in _UNNAMED:
            left_out.append(name)
    options = kept.get("stream_options")
    if options is not None and not kept.get("stream"):
        del kept["stream_options"]
    elif isinstance(options, Mapping) and options.get("include_obfuscation"):
        kept["stream_options"] = {key: value for key, value in options.items() if key != "include_obfuscation"}
        left_out.append("stream_options.include_obfuscation")
    return kept, left_out


def left_out_warning(names: Iterable[str]) -> list[str]:
    """One sentence for all that was left out, or none."""
    listed = list(dict.fromkeys(name[:80] for name in names))
    if not listed:
        return []
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return [f"left out, without effect here: {', '.join(listed[:_MAX_NAMED])}{more}"]


class AcceptedChat:
    """A chat request's body as the strict schema reads it, and what of it is not carried out.

    Args:
        body: as the client sent it; it is not changed.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.told: list[str] = []
        kept, self._left_out = accept_fields(body)
        self._settle_reasoning(kept)
        self._settle_limits(kept)
        self._mark_partial(kept)
        for name in ("messages", "tools"):
            if isinstance(kept.get(name), list):
                read = self._message if name == "messages" else self._tool
                kept[name] = [read(each, f"{name}[]") for each in kept[name]]
        if not kept.get("tools"):
            kept.pop("parallel_tool_calls", None)
        kept["tool_choice"] = self._tool_choice(kept.get("tool_choice"))
        self.body: dict[str, Any] = {name: value for name, value in kept.items() if value is not None}
        self.told += left_out_warning(self._left_out)

    def _leave_out(self, name: str) -> None:
        self._left_out.append(name)

    def _settle_limits(self, kept: dict[str, Any]) -> None:
        older, newer = kept.get("max_tokens"), kept.get("max_completion_tokens")
        if older is not None and newer is not None and older != newer:
            del kept["max_tokens"]
            self.told.append(f"max_tokens {str(older)[:40]} was not used: max_completion_tokens is {str(newer)[:40]}")

    def _mark_partial(self, kept: dict[str, Any]) -> None:
        """vLLM's `continue_final_message` is Moonshot's `partial` on the last message."""
        messages = kept.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        wanted = kept.pop("continue_final_message", None) is True
        if wanted and isinstance(messages, list) and isinstance(last, Mapping) and last.get("role") == "assistant":
            kept["messages"] = [*messages[:-1], {**last, "partial": True}]

    def _settle_reasoning(self, kept: dict[str, Any]) -> None:
        """The many ways to ask for reasoning, as one: `thinking` with type, budget_tokens and keep."""
        wishes: dict[str, bool] = {}
        settled: dict[str, Any] = {}
        for name in _THINKING_FIELDS:
            if name in kept:
                self._read_wish(name, kept.pop(name), wishes, settled)
        if len(set(wishes.values())) > 1:
            used = next(iter(wishes))
            rest = ", ".join(name for name in wishes if wishes[name] != wishes[used])
            self.told.append(f"{rest} contradicts {used} and was not used")
        if wishes and not next(iter(wishes.values())):
            settled.pop("effort", None)
        if wishes:
            settled["type"] = "enabled" if next(iter(wishes.values())) else "disabled"
        if settled:
            kept["thinking"] = settled

    def _read_wish(self, name: str, value: Any, wishes: dict[str, bool], settled: dict[str, Any]) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                match key:
                    case "type" | "enabled" | "thinking" | "enable_thinking" | "effort" | "reasoning_effort":
                        self._read_wish("reasoning_effort" if "effort" in key else name, inner, wishes, settled)
                    case "budget_tokens" | "max_tokens" | "thinking_budget":
                        self._read_wish("thinking_budget", inner, wishes, settled)
                    case "keep":
                        self._read_keep(inner, settled)
                    case "preserve_thinking":
                        settled.setdefault("keep", "all" if inner is True else None)
                    case "exclude" | "summary" | "generate_summary" | "display" if inner in (
                        None,
                        False,
                        "auto",
                        "omitted",
                    ):
                        pass
                    case _ if inner is not None:
                        self._leave_out(f"{name}.{key}")
        elif "budget" in name:
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                settled.setdefault("budget_tokens", value)
            elif value is not None and value != -1:  # -1: no limit
                self._leave_out(name)
        elif isinstance(value, bool):
            wishes.setdefault(name, value)
        elif isinstance(value, str) and value.lower() in EFFORT_BUDGETS:
            wishes.setdefault("reasoning_effort", True)
            settled.setdefault("effort", value.lower())
        elif isinstance(value, str) and value.lower() in _ON | _OFF:
            wishes.setdefault(name, value.lower() in _ON)
        elif value is not None:
            self._leave_out(name)

    def _read_keep(self, keep: Any, settled: dict[str, Any]) -> None:
        if keep == "all":
            settled["keep"] = "all"
        elif keep not in (None, "none", "after_last_user", "after_last_non_tool_call_assistant"):
            self._leave_out("thinking.keep")

    def _tool_choice(self, choice: Any) -> Any:
        """The forms of other APIs as OpenAI's chat completions write them."""
        if not isinstance(choice, Mapping):
            return choice
        name = choice.get("name")
        match choice.get("type"):
            case "auto" | "none" | "required" as mode:
                return mode
            case "any":
                return "required"
            case "function" | "tool" if isinstance(name, str) and "function" not in choice:
                return {"type": "function", "function": {"name": name}}
            case "allowed_tools":
                allowed = choice.get("allowed_tools")
                self._leave_out("tool_choice.allowed_tools.tools")
                return allowed.get("mode", "auto") if isinstance(allowed, Mapping) else "auto"
        return choice

    def _message(self, message: Any, where: str) -> Any:
        if not isinstance(message, Mapping):
            return message
        kept = {key: value for key, value in message.items() if value is not None}
        if kept.get("role") == "function":  # OpenAI's first form of a tool's result
            kept |= {"role": "tool", "tool_call_id": str(kept.get("name") or "function")}
        told = kept.pop("reasoning", None)
        if isinstance(told, str):
            kept.setdefault("reasoning_content", told)
        elif told is not None:
            self._leave_out(f"{where}.reasoning")
        for key in [key for key in kept if key not in _MESSAGE_FIELDS]:
            self._drop(kept, key, where)
        self._drop_foreign(kept, where)
        if isinstance(kept.get("content"), list):
            kept["content"] = [self._part(part, f"{where}.content[]") for part in kept["content"]]
        if kept.get("role") in ("assistant", "tool"):
            kept["content"] = self._as_history(kept.get("content"), where)
        if isinstance(kept.get("tool_calls"), list):
            kept["tool_calls"] = [self._call(call, f"{where}.tool_calls[]") for call in kept["tool_calls"]]
        elif isinstance(call := kept.pop("function_call", None), Mapping):
            kept["tool_calls"] = [self._call({"function": call}, f"{where}.function_call")]
        return kept

    def _as_history(self, content: Any, where: str) -> Any:
        """Content of an earlier turn: empty is empty, a part that cannot be read is named, other JSON is its text."""
        if content is None or content == []:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(
            isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
        ):
            return _json(content)
        parts: list[Any] = []
        for part in content:
            kind = part["type"]
            if kind in PICTURE_KINDS or (kind in ("text", "refusal") and isinstance(part.get(kind), str)):
                parts.append(part)
            else:
                self._leave_out(f"{where}.content[] of type '{kind}'")
                parts.append({"type": "text", "text": f"[{kind[:40]}: left out, this server cannot read it]"})
        return parts

    def _drop_foreign(self, kept: dict[str, Any], where: str) -> None:
        """Fields that an answer of some server has and that mean nothing in a history."""
        for key in ("audio", "annotations", "refusal"):
            if not isinstance(kept.get(key), str | list | type(None)) or (key == "audio" and key in kept):
                self._drop(kept, key, where)

    def _drop(self, kept: dict[str, Any], key: str, where: str) -> None:
        del kept[key]
        if key not in _UNNAMED:
            self._leave_out(f"{where}.{key}")

    def _part(self, part: Any, where: str) -> Any:
        if not isinstance(part, Mapping):
            return {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type")
        if kind in ("input_text", "output_text"):
            part = {**part, "type": "text"}
            kind = "text"
        if kind not in ("text", "refusal"):
            return part
        kept = dict(part)
        for key in [key for key in kept if key not in _PART_FIELDS and key != kind]:
            self._drop(kept, key, where)
        return kept

    def _call(self, call: Any, where: str) -> Any:
        if not isinstance(call, Mapping):
            return call
        kept = {key: value for key, value in call.items() if value is not None}
        if isinstance(custom := kept.pop("custom", None), Mapping):  # free text, as one argument
            kept["function"] = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
        for key in [key for key in kept if key not in _CALL_FIELDS]:
            self._drop(kept, key, where)
        function = kept.get("function")
        if isinstance(function, Mapping):
            for key in function:
                if key not in ("name", "arguments") and function[key] is not None:
                    self._leave_out(f"{where}.function.{key}")
            arguments = function.get("arguments")
            text = "{}" if arguments is None else arguments if isinstance(arguments, str) else _json(arguments)
            kept["function"] = {"name": str(function.get("name") or "tool"), "arguments": text}
        index = kept.get("index")
        return {
            **kept,
            "id": str(kept.get("id") or ""),
            "type": "function",
            "index": index if type(index) is int else None,
        }

    def _tool(self, tool: Any, where: str) -> Any:
        if not isinstance(tool, Mapping):
            return tool
        kept = {key: value for key, value in tool.items() if value is not None}
        for key in [key for key in kept if key not in ("type", "function")]:
            self._drop(kept, key, where)
        function = kept.get("function")
        if isinstance(function, Mapping):
            known = ("name", "description", "parameters", "strict")
            for key in function:
                if key not in known and function[key] is not None and key not in _UNNAMED:
                    self._leave_out(f"{where}.function.{key}")
            kept["function"] = {key: function[key] for key in known if key in function}
        return kept


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
