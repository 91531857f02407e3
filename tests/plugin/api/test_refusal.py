"""Errors of ours as text in exo's chunks, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import (
    ContextLengthError,
    OverloadedError,
    RequestError,
    StageDiedError,
    TemplateError,
    UnsupportedError,
)
from exo_kimi.plugin.api.refusal import Refusal


@given(status=st.sampled_from((400, 500, 503)), code=st.from_regex(r"[a-z_]{1,20}", fullmatch=True), message=st.text())
def test_a_refusal_survives_its_way_through_exo(status: int, code: str, message: str) -> None:
    refusal = Refusal(status=status, code=code, message=message)
    assert Refusal.from_text(refusal.to_text()) == refusal


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthError("too long", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (UnsupportedError("images are not supported"), 400, "invalid_value"),
        (RequestError("no such tool"), 400, "invalid_value"),
        (OverloadedError("the queue is full"), 503, "overloaded"),
        (StageDiedError("stage 1 died"), 503, "engine_unavailable"),
        (ZeroDivisionError("by zero"), 500, "internal_error"),
    ],
)
def test_every_kind_of_error_has_its_status(error: Exception, status: int, code: str) -> None:
    refusal = Refusal.of(error)
    assert (refusal.status, refusal.code) == (status, code)
    assert str(error).splitlines()[0] in refusal.message


def test_a_template_error_does_not_tell_the_nodes_files() -> None:
    refusal = Refusal.of(
        TemplateError("the template refuses", found="two systems", where="/models/k2/chat_template.jinja")
    )
    assert (refusal.status, refusal.message) == (400, "the template refuses: two systems")


@pytest.mark.parametrize(
    ("text", "status"), [("Runner shutdown before completing command (signal=9)", 503), ("boom", 500), ("", 500)]
)
def test_exos_own_errors_have_a_status_and_words(text: str, status: int) -> None:
    refusal = Refusal.from_text(text)
    assert refusal.status == status and refusal.message == (text or "exo gave no reason")
