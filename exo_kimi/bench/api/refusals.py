"""Checks of what a server must refuse. Status, form and code are checks of their own, so that one gap counts once."""

from __future__ import annotations

from exo_kimi.bench.api.caller import QUESTION, Caller, Checks, error_object, expect, expect_status

checks = Checks("errors")
CHAT = "/v1/chat/completions"
JSON_HEADERS = {"content-type": "application/json"}
NO_MODEL = "no-such-model-anywhere"


@checks
def error_form(api: Caller) -> None:
    """An error is an object with message, type, param and code."""
    error_object(api.refused(400, {"temperature": "hot"}))


@checks
def error_names_the_parameter(api: Caller) -> None:
    """`param` is the field at fault."""
    error = error_object(api.refused(400, {"temperature": "hot"}))
    expect(error["param"] == "temperature", f"param is {error['param']!r}")


@checks
def messages_missing(api: Caller) -> None:
    """A request without messages is a 400."""
    api.refused(400, {"messages": ...})


@checks
def messages_empty(api: Caller) -> None:
    """An empty list of messages is a 400."""
    api.refused(400, {"messages": []})


@checks
def unknown_role(api: Caller) -> None:
    """A role that does not exist is a 400."""
    api.refused(400, {"messages": [{"role": "narrator", "content": "Once"}]})


@checks
def wrong_type(api: Caller) -> None:
    """A field of the wrong type is a 400."""
    api.refused(400, {"temperature": "hot"})


@checks
def temperature_out_of_range(api: Caller) -> None:
    """temperature is 0 to 2."""
    api.refused(400, {"temperature": 3})


@checks
def top_p_out_of_range(api: Caller) -> None:
    """top_p is 0 to 1."""
    api.refused(400, {"top_p": 1.5})


@checks
def penalty_out_of_range(api: Caller) -> None:
    """Penalties are -2 to 2."""
    api.refused(400, {"frequency_penalty": 3})


@checks
def bias_out_of_range(api: Caller) -> None:
    """logit_bias values are -100 to 100."""
    api.refused(400, {"logit_bias": {"300": 101}})


@checks
def alternatives_without_logprobs(api: Caller) -> None:
    """top_logprobs needs logprobs."""
    api.refused(400, {"top_logprobs": 2})


@checks
def image_for_a_text_model(api: Caller) -> None:
    """A model without vision refuses images with a 400."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    api.refused(400, {"messages": [{"role": "user", "content": [part]}]})


@checks
def unknown_parameter(api: Caller) -> None:
    """A parameter that does not exist is a 400."""
    api.refused(400, {"tempratur": 0.5})


@checks
def unsupported_is_not_ignored(api: Caller) -> None:
    """Documented features that change the answer (audio output) are honoured or refused, never ignored."""
    api.refused(400, {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}})


@checks
def context_exceeded(api: Caller) -> None:
    """A prompt that is longer than the context is a 400."""
    api.refused(400, _too_long(api))


@checks
def context_exceeded_code(api: Caller) -> None:
    """Its code is context_length_exceeded."""
    error = error_object(api.refused(400, _too_long(api)))
    expect(error["code"] == "context_length_exceeded", f"code is {error['code']!r}")


@checks
def unknown_model(api: Caller) -> None:
    """A model that does not exist is a 404."""
    api.refused(404, {"model": NO_MODEL})


@checks
def unknown_model_code(api: Caller) -> None:
    """Its code is model_not_found."""
    error = error_object(api.refused(404, {"model": NO_MODEL}))
    expect(error["code"] == "model_not_found", f"code is {error['code']!r}")


@checks
def unknown_model_by_id(api: Caller) -> None:
    """GET of a model that does not exist is a 404."""
    expect_status(api.http.get(f"/v1/models/{NO_MODEL}").status_code, 404)


@checks
def unknown_url(api: Caller) -> None:
    """A path that does not exist is a 404."""
    expect_status(api.http.post("/v1/no-such-thing", json={}).status_code, 404)


@checks
def unknown_url_form(api: Caller) -> None:
    """It has the form of an error too."""
    error_object(api.http.post("/v1/no-such-thing", json={}).content)


@checks
def wrong_method(api: Caller) -> None:
    """GET where only POST is documented is a 405."""
    expect_status(api.http.get(CHAT).status_code, 405)


@checks
def malformed_json(api: Caller) -> None:
    """100 KB that are no JSON are a 400."""
    body = b'{"messages": "' + b"x" * 100_000
    expect_status(api.http.post(CHAT, content=body, headers=JSON_HEADERS).status_code, 400)


@checks
def json_nested_too_deep(api: Caller) -> None:
    """100,000 open brackets are a 400."""
    body = b'{"messages": ' + b"[" * 100_000
    expect_status(api.http.post(CHAT, content=body, headers=JSON_HEADERS).status_code, 400)


@checks
def not_an_object(api: Caller) -> None:
    """JSON that is no object is a 400."""
    expect_status(api.http.post(CHAT, json=[1, 2]).status_code, 400)


@checks
def not_utf8(api: Caller) -> None:
    """A body that is not UTF-8 is a 400."""
    body = b'{"messages": "\xff\xfe"}'
    expect_status(api.http.post(CHAT, content=body, headers=JSON_HEADERS).status_code, 400)


@checks
def half_a_surrogate(api: Caller) -> None:
    """Text that no encoding can hold is a 400."""
    messages = [*QUESTION, {"role": "user", "content": "half"}]
    data = api.http.build_request("POST", CHAT, json=api.body(stream=True, messages=messages)).content
    with api.http.stream("POST", CHAT, content=data.replace(b"half", b"\\ud800"), headers=JSON_HEADERS) as response:
        expect_status(response.status_code, 400)


def _too_long(api: Caller) -> dict[str, object]:
    """A conversation that no context of this server holds; one that does not tell its context would compute any for minutes."""
    card = api.http.get("/v1/models").json()["data"][0]
    context = int(card.get("context_length") or card.get("max_model_len") or 0)
    expect(context > 0, "/v1/models tells no context")
    return {"messages": [{"role": "user", "content": "word " * (context + 1)}], "max_tokens": 1}
