"""The judge of a soak: what is right, told and neither; and a table that is bad when anything in it is."""

from __future__ import annotations

import json
import random

import httpx
import pytest

from exo_kimi.bench.claims import soak
from exo_kimi.bench.claims.soak import Course
from exo_kimi.bench.frame import Result, finish
from exo_kimi.bench.soak.clients import Seen, SoakPrompt, SoakVerdict, ask, questions
from exo_kimi.bench.soak.server import Held

QUESTION = SoakPrompt("hi", 8)


def events(*chunks: dict[str, object], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def delta(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def whole(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


ERROR = {"error": {"code": "stage_died", "message": "stage 1 died"}}


@pytest.mark.parametrize(
    ("kind", "status", "content", "expected"),
    [
        ("whole", 200, whole("four"), "right"),
        ("whole", 200, whole("five"), "wrong"),
        ("whole", 503, json.dumps(ERROR).encode(), "told"),
        ("whole", 502, b"<html>", "unclear"),
        ("stream", 200, events(delta("fo"), delta("ur", "stop")), "right"),
        ("stream", 200, events(delta("fo"), delta("", "stop")), "wrong"),
        ("stream", 200, events(delta("fo"), ERROR), "told"),
        ("stream", 200, events(delta("fo"), done=False), "unclear"),
        ("stream", 200, events(delta("four", "stop"), done=False), "unclear"),
        ("leave", 200, events(delta("a"), delta("b"), delta("c")), "left"),
    ],
)
def test_an_answer_is_judged_by_what_a_client_saw(kind, status, content, expected) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
    with httpx.Client(base_url="http://server", transport=transport) as client:
        assert ask(client, QUESTION, "four", kind=kind).kind == expected


@pytest.mark.parametrize(("error", "expected"), [(httpx.ReadTimeout, "hung"), (httpx.RemoteProtocolError, "unclear")])
def test_silence_and_a_broken_connection_are_told_apart(error, expected) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error("no more", request=request)

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(fail)) as client:
        assert ask(client, QUESTION, "four", kind="whole").kind == expected


def test_questions_are_the_same_for_the_same_seed_and_all_different() -> None:
    made = questions(40, random.Random(3))
    assert made == questions(40, random.Random(3))
    assert len(set(made)) == 40


def verdict(seen: Seen, course: Course, *, ended_s: float = 0.5, alive: bool = True, left: int = 0) -> int:
    rows = [
        *soak._answer_rows(seen, ties=0, survive=False),
        *soak._life_rows(course, alive=alive, ended_s=ended_s, left=left),
    ]
    return finish(Result(bench="soak", rows=rows))


def good() -> tuple[Seen, Course]:
    seen = Seen()
    for kind in ("right", "right", "told", "left"):
        seen.add(SoakVerdict(kind))
    held = Held(rss_bytes=100_000_000, descriptors=30)
    return seen, Course(recoveries_s=[(2.0, "a kill")], early=held, late=held)


def test_a_good_course_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(*good()) == 0
    assert "MISSED" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["wrong", "hung", "unclear"])
def test_one_bad_answer_is_one_too_many(kind, capsys: pytest.CaptureFixture[str]) -> None:
    seen, course = good()
    seen.add(SoakVerdict(kind, "what was seen"))
    assert verdict(seen, course) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"stuck": ["kill -9 of a stage"]},
        {"recoveries_s": [(2.0, "a kill"), (soak.RECOVERY_S + 1, "a freeze")]},
        {"late": Held(rss_bytes=100_000_000 + 2 * soak.GROWTH_BYTES, descriptors=30)},
        {"late": Held(rss_bytes=100_000_000, descriptors=100)},
    ],
)
def test_a_course_that_grows_or_never_recovers_is_bad(change) -> None:
    seen, course = good()
    for name, value in change.items():
        setattr(course, name, value)
    assert verdict(seen, course) == 1


@pytest.mark.parametrize("end", [{"ended_s": 6.0}, {"alive": False}, {"left": 1}])
def test_a_server_that_ends_badly_is_bad(end) -> None:
    assert verdict(*good(), **end) == 1
