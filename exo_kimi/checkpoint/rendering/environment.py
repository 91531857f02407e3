"""Chat templates in a Jinja sandbox, compiled and rendered the way Hugging Face renders them. Runs in a `process` only.

Source: transformers `utils/chat_template_utils.py` (environment, filters and globals).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from exo_kimi.checkpoint.rendering.messages import MAX_RENDERED_CHARS, RenderFailure

# Products that no template of a conversation has: the process' limits end the rest, these can be told by their line.
_MAX_REPEATED = 2**24  # characters or items
_MAX_POWER_BITS = 2**16
_TEMPLATE_FRAME = "<template>"


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a template with these variables.

    Raises:
        RenderFailure: there is none.
    """
    template = compiled(source)
    pieces: list[str] = []
    size_chars = 0
    try:
        for piece in template.generate(dict(variables)):
            pieces.append(piece)
            size_chars += len(piece)
            if size_chars > MAX_RENDERED_CHARS:
                raise RenderFailure("limit", f"it writes over {MAX_RENDERED_CHARS} characters")
        return "".join(pieces)
    except RenderFailure:
        raise
    except _RefusalError as error:
        raise RenderFailure("refused", error.message or "", _line(error)) from None
    except _TooLargeError as error:
        raise RenderFailure("limit", str(error), _line(error)) from None
    except MemoryError as error:
        raise RenderFailure("limit", "it takes too much memory", _line(error)) from None
    except RecursionError:
        raise RenderFailure("failed", "the messages are nested too deep or too large") from None
    except Exception as error:  # noqa: BLE001  # the edge of the process: whatever a template does is its failure
        raise RenderFailure("failed", f"{type(error).__name__}: {error}", _line(error)) from None


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template, ready to render.

    Raises:
        RenderFailure: it does not compile.
    """
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RenderFailure("compile", error.message or type(error).__name__, error.lineno) from None
    except RecursionError:
        raise RenderFailure("compile", "it is nested too deep") from None
    except MemoryError:
        raise RenderFailure("limit", "it takes too much memory") from None
    except Exception as error:  # noqa: BLE001  # as above: a number of thousands of digits is a ValueError
        raise RenderFailure("compile", f"{type(error).__name__}: {error}") from None


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses products that are absurdly large; an intercepted operator is not computed while the template compiles either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                sized = isinstance(many, str | list | tuple) and isinstance(times, int)
                if sized and len(many) * times > _MAX_REPEATED:
                    raise _TooLargeError(f"it repeats a value to over {_MAX_REPEATED} characters or items")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_POWER_BITS:
            raise _TooLargeError(f"a power of over {_MAX_POWER_BITS} bits")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RefusalError(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


class _TooLargeError(Exception):
    """A value that is not computed."""


def _line(error: BaseException) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TEMPLATE_FRAME]
    return lines[-1] if lines else None


def _raise_exception(message: str) -> NoReturn:
    raise _RefusalError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
