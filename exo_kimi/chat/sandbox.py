"""Chat templates in a Jinja sandbox, compiled and rendered the way Hugging Face renders them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from exo_kimi.errors import TemplateError

# A template that repeats its input this often is broken or hostile.
MAX_RENDERED_CHARS = 64 * 2**20
_TEMPLATE_FRAME = "<template>"


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class CompiledTemplate:
    """One template, ready to render.

    Args:
        source: the Jinja text.
        where: the file it came from, for errors.

    Raises:
        TemplateError: it does not compile.

    Source: transformers `utils/chat_template_utils.py` (environment, filters and globals).
    """

    def __init__(self, source: str, where: str) -> None:
        self.source = source
        self.where = where
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                "the chat template does not compile", found=error.message, where=f"{where}, line {error.lineno}"
            ) from error
        except RecursionError as error:
            raise TemplateError(
                "the chat template does not compile", found="it is nested too deep", where=where
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template with these variables.

        Raises:
            TemplateError: the template failed, refused the messages, or wrote without end.
        """
        pieces: list[str] = []
        size_chars = 0
        try:
            for piece in self._template.generate(dict(variables)):
                pieces.append(piece)
                size_chars += len(piece)
                if size_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(
                        "the chat template writes too much",
                        expected=f"at most {MAX_RENDERED_CHARS} characters",
                        where=self.where,
                    )
        except _Refusal as error:
            raise TemplateError(
                "the chat template refuses these messages", found=error.message, where=self._line(error)
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(
                "the chat template failed on these messages",
                found=f"{type(error).__name__}: {error}",
                where=self._line(error),
            ) from error
        except (RecursionError, MemoryError) as error:
            raise TemplateError(
                "the chat template failed on these messages",
                found="they are nested too deep or too large",
                where=self.where,
            ) from error
        return "".join(pieces)

    def _line(self, error: Exception) -> str:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TEMPLATE_FRAME
        ]
        return f"{self.where}, line {lines[-1]}" if lines else self.where


class _Refusal(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(str(message))


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
