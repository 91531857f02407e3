"""Check the chat template: that there is one, that it compiles, and that one message comes out as a turn of Kimi."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.checks.tokenizer import TOKENIZER_CONFIG
from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.rendering.messages import RenderFailure
from exo_kimi.checkpoint.rendering.pool import shared_pool
from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.errors import TemplateError

TEMPLATE_FILE = "chat_template.jinja"
_MARK = "one message of a user"
_TURN = ("<|im_user|>", "<|im_middle|>", "<|im_end|>", "<|im_assistant|>")
_WHAT = {
    "compile": "the chat template does not compile",
    "limit": "the chat template takes too much time, memory or text for one message",
}
_FIX = f"copy it from the model's original repository, or delete it: --fix then writes {TEMPLATE_FILE}"


def check_template(
    root: Path,
    tokenizer_config: Mapping[str, Any] | None,
    special: Mapping[str, int] | None,
    model_type: object,
    checkup: Checkup,
) -> None:
    """Note every finding about the chat template, and the built-in one where there is none.

    Args:
        root: the checkpoint.
        tokenizer_config: tokenizer_config.json, where older checkpoints keep it; None when it cannot be read.
        special: control tokens by name; None where the tokenizer cannot be read.
        model_type: the one in config.json, by which K2.5 and later are recognised.
        checkup: gets the findings.
    """
    path = root / TEMPLATE_FILE
    where = TEMPLATE_FILE
    stated: object = None
    try:
        stated = read_text(path)
    except FileNotFoundError:
        stated = (tokenizer_config or {}).get("chat_template")
        where = f"{TOKENIZER_CONFIG}, chat_template"
    except (OSError, UnicodeDecodeError) as error:
        checkup.error(TemplateError("the chat template cannot be read", found=error, where=where, fix=_FIX))
        return
    if stated is None or (where == TEMPLATE_FILE and not str(stated).strip()):
        _no_template(root, stated, special, model_type, checkup)
        return
    templates = _named(stated)
    if not templates:
        checkup.error(
            TemplateError(
                "the chat template is malformed",
                expected='a string, or named templates with one called "default"',
                found=type(stated).__name__,
                where=where,
                fix=_FIX,
            )
        )
    for name, source in templates.items():
        _check_source(source, where if name is None else f"{where}, {name}", checkup)


def built_in_template(special: Mapping[str, int], model_type: object) -> tuple[str, str]:
    """Our own template for a checkpoint's family: the family's name and the text.

    Instruct has no think tags; Thinking has; K2.5 and later (kimi_k25) open or close them in the prompt. A test
    holds the choice to that of `chat.template`.
    """
    family = "k25" if model_type == "kimi_k25" else "thinking" if "<think>" in special else "instruct"
    folder = resources.files("exo_kimi").joinpath("chat", "templates")
    names = ("macros.jinja", f"{family}.jinja")
    return family, "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def _no_template(
    root: Path, stated: object, special: Mapping[str, int] | None, model_type: object, checkup: Checkup
) -> None:
    error = TemplateError(
        "the chat template is missing" if stated is None else "the chat template is empty",
        expected=f"{TEMPLATE_FILE}, or chat_template in {TOKENIZER_CONFIG}",
        where=TEMPLATE_FILE,
        fix="copy it from the model's original repository, or let --fix write our own",
    )
    # exo-kimi has its own for a checkpoint without; an empty file is a template that says nothing.
    (checkup.warn if stated is None else checkup.error)(error, fixable=special is not None)
    if special is not None:
        family, text = built_in_template(special, model_type)
        checkup.remedy(TEMPLATE_FILE, text, [f"exo-kimi's own template for the {family} family"])


def _named(stated: object) -> dict[str | None, str]:
    """One template under None, or several by name, in both forms; empty when none is usable."""
    if isinstance(stated, str):
        return {None: stated}
    items: list[tuple[object, object]] = list(stated.items()) if isinstance(stated, dict) else []
    if isinstance(stated, list):
        items = [(item.get("name"), item.get("template")) for item in stated if isinstance(item, dict)]
    named: dict[str | None, str] = {k: v for k, v in items if isinstance(k, str) and isinstance(v, str)}
    return named if "default" in named else {}


def _check_source(source: str, where: str, checkup: Checkup) -> None:
    problem = _problem_of(source)
    if problem is not None:
        what, expected, found = problem
        checkup.error(TemplateError(what, expected=expected, found=found, where=where, fix=_FIX))
    elif "tool_calls" not in source:
        checkup.warn(
            TemplateError(
                "the chat template shows no past tool calls: an agent's model never sees what it has called",
                expected="`tool_calls` of messages, with their ids (Moonshot's templates since July 2025)",
                found="none",
                where=where,
                fix="copy today's from the model's original repository, or delete it: --fix then writes our own",
            )
        )


@lru_cache(maxsize=8)  # a repair looks twice
def _problem_of(source: str) -> tuple[str, str | None, str] | None:
    """What is wrong with a template, what was expected and what was found."""
    message = {"role": "user", "content": _MARK}
    try:
        asked, told = (
            shared_pool().render(source, {"messages": [message], "tools": None, "add_generation_prompt": ask})
            for ask in (True, False)
        )
    except RenderFailure as failure:
        place = "" if failure.line is None else f"line {failure.line}: "
        return _WHAT.get(failure.kind, "the chat template fails on one message"), None, f"{place}{failure.found}"
    lost = [token for token in (_MARK, *_TURN) if token not in asked]
    if lost or asked == told:
        expected = f"{', '.join(_TURN)} and the message, the last of them where the reply begins"
        found = f"without {', '.join(lost)}" if lost else "nothing that asks for a reply"
        return "the chat template does not write a turn of Kimi", expected, found
    return None
