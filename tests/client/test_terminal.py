"""The terminal chat: what it shows, what it sends, and one clear message for each way to fail."""

from __future__ import annotations

import io
import json
import re

import httpx
import pytest
from rich.console import Console

from exo_kimi.client.chat_client import ChatClient
from exo_kimi.client.terminal import Talk, chat
from exo_kimi.errors import RequestError, RuntimeFault, UsageError


def screen():
    """A console that writes into a string."""
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def said(console):
    """What a console wrote."""
    return console.file.getvalue()


def fake(answer):
    """A client of a server that is one function."""
    return ChatClient("http://test", model="m", transport=httpx.MockTransport(answer))


def streamed(text):
    """An event stream of this text."""
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def sse(*chunks):
    """A finished stream."""
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return streamed(f": ping\n\n{text}data: [DONE]\n\n")


def delta(**fields):
    """One chunk."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def test_a_piped_message_is_answered_and_ends_the_program(saying, live):
    server = live(saying("It rains in Oslo today, with a long line that must not be wrapped anywhere at all."))
    console = screen()
    chat(server.url, stdin=io.StringIO("What is\nthe weather?\n"), console=console)
    assert said(console) == "It rains in Oslo today, with a long line that must not be wrapped anywhere at all.\n"
    chat(f"{server.url}/v1/", stdin=io.StringIO("  \n"), console=console)
    (request,) = server.engine.requests
    assert "What is\nthe weather?" in server.engine.voice.tokenizer.decode(request.prompt_ids)


def test_the_conversation_grows_and_reset_forgets_it(saying, live):
    server = live(saying("Yes."))
    console = screen()
    with ChatClient(server.url) as client:
        talk = Talk(client, console, "Be brief.")
        lines = iter(["one", "two", "/reset", "three", "/system Be long.", "four", "/what", "", "/exit", "never"])
        talk.loop(lambda: next(lines))
    prompts = [server.engine.voice.tokenizer.decode(request.prompt_ids) for request in server.engine.requests]
    assert len(prompts) == 4
    assert "one" in prompts[1]
    assert "Yes." in prompts[1]
    assert "one" not in prompts[2]
    assert "Be brief." in prompts[2]
    assert "Be long." in prompts[3]
    assert "/exit leaves" in said(console)


def test_reasoning_is_shown_apart_and_control_characters_are_not(saying, live, thinker):
    server = live(saying("Hmm.</think>\x1b[31mIt\x07 rains.\x9b", by=thinker))
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ChatClient(server.url) as client:
        Talk(client, console).ask("Hi")
    plain = re.sub(r"\x1b\[(2|0)m", "", said(console))  # dim on and off
    assert said(console).startswith("\x1b[2m")
    assert plain == "Hmm.\n\n[31mIt rains.\n"


def test_ctrl_c_stops_the_answer_and_not_the_program():
    class Interrupted(httpx.SyncByteStream):
        def __iter__(self):
            yield f"data: {json.dumps(delta(content='Half of '))}\n\n".encode()
            raise KeyboardInterrupt

    head = {"content-type": "text/event-stream"}
    answers = iter([httpx.Response(200, stream=Interrupted(), headers=head), sse(delta(content="Whole."))])
    sent = []

    def answer(request):
        sent.append(json.loads(request.content)["messages"])
        return next(answers)

    console = screen()
    talk = Talk(fake(answer), console)
    lines = iter(["first", "second", "/exit"])
    talk.loop(lambda: next(lines))
    assert "Half of  [stopped]" in said(console)
    assert "Whole." in said(console)
    assert [message["content"] for message in sent[1]] == ["first", "Half of ", "second"]


def test_ctrl_c_at_the_prompt_is_no_exit_and_the_end_of_input_is():
    def read():
        raise errors.pop(0)

    errors = [KeyboardInterrupt(), EOFError()]
    console = screen()
    Talk(fake(lambda request: sse()), console).loop(read)
    assert "Ctrl-D leaves" in said(console)


def test_an_error_is_shown_and_the_message_can_be_sent_again():
    def answer(request):
        return next(answers)

    refusal = httpx.Response(400, json={"error": {"message": "too long", "type": "x", "param": None, "code": None}})
    broken = sse(delta(content="Well"), {"error": {"message": "stage 1 died"}})
    answers = iter([refusal, broken, sse(delta(content="Fine."))])
    console = screen()
    talk = Talk(fake(answer), console)
    lines = iter(["one", "two", "three", "/exit"])
    talk.loop(lambda: next(lines))
    assert "too long" in said(console)
    assert "stage 1 died" in said(console)
    assert [message["content"] for message in talk.messages] == ["three", "Fine."]


def test_each_way_to_fail_is_one_error():
    def client(response):
        return ChatClient("http://test", transport=httpx.MockTransport(lambda request: response))

    with pytest.raises(UsageError, match="no server answers"):
        ChatClient("http://127.0.0.1:9").model()
    with pytest.raises(UsageError, match=r"cannot read|no server"):
        ChatClient("http://[bad").model()
    with pytest.raises(UsageError, match="no server answers"):
        ChatClient("ftp://host").model()
    with pytest.raises(UsageError, match="not a chat server"):
        client(httpx.Response(200, text="<html>")).model()
    with pytest.raises(RequestError, match="no such page"):
        client(httpx.Response(404, text="no such page")).model()
    with pytest.raises(RequestError, match="bare"):
        client(httpx.Response(400, json={"error": "bare"})).model()
    with pytest.raises(RuntimeFault, match="loading"):
        list(fake(lambda request: httpx.Response(503, json={"error": {"message": "loading"}})).stream([]))
    with pytest.raises(RuntimeFault, match="without \\[DONE\\]"):
        list(fake(lambda request: streamed("data: {}\n\n")).stream([]))
    with pytest.raises(RuntimeFault, match="not JSON"):
        list(fake(lambda request: streamed("data: {\n\n")).stream([]))
    with pytest.raises(RuntimeFault, match="did not stream"):
        list(fake(lambda request: httpx.Response(200, json={"choices": []})).stream([]))


def test_health_is_read_also_when_it_is_bad(saying, live):
    server = live(saying(ready=False))
    with ChatClient(server.url) as client:
        assert client.health()["status"] == "unavailable"
