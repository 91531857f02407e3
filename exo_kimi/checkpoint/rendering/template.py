"""One chat template, compiled and rendered in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exo_kimi.checkpoint.rendering.messages import FailureKind, RenderFailure
from exo_kimi.checkpoint.rendering.pool import RenderPool, shared_pool
from exo_kimi.errors import TemplateError

_WHAT: Final[Mapping[FailureKind, str]] = {
    "compile": "the chat template does not compile",
    "refused": "the chat template refuses these messages",
    "failed": "the chat template failed on these messages",
    "limit": "the chat template takes too much time, memory or text",
}
_TRIAL: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": None,
    "add_generation_prompt": True,
}


class CompiledTemplate:
    """One template that compiles and that a first message does not keep busy for ever.

    Args:
        source: the Jinja text.
        where: the file it came from, for errors.
        pool: of the processes; None takes that of this process.

    Raises:
        TemplateError: it does not compile, or one message takes it over its limits.
    """

    def __init__(self, source: str, where: str, *, pool: RenderPool | None = None) -> None:
        self.source = source
        self.where = where
        self._pool = pool or shared_pool()
        try:
            self._pool.render(source, _TRIAL)
        except RenderFailure as failure:
            if failure.kind in ("compile", "limit"):  # a template may well refuse this conversation
                raise self._error(failure) from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template with these variables, which are JSON values.

        Raises:
            TemplateError: the template failed, refused the messages, or took more than its limits.
            OverloadedError: too many renderings are under way.
        """
        try:
            return self._pool.render(self.source, variables)
        except RenderFailure as failure:
            raise self._error(failure) from None

    def _error(self, failure: RenderFailure) -> TemplateError:
        where = self.where if failure.line is None else f"{self.where}, line {failure.line}"
        return TemplateError(_WHAT[failure.kind], found=failure.found, where=where)
