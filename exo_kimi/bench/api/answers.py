"""Checks of whole chat answers: their form, and that each sampling field does what OpenAI documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from exo_kimi.bench.api.caller import QUESTION, Caller, Checks, content_of, expect

checks = Checks("chat answers")


@checks
def chat_answer_form(api: Caller) -> None:
    """id, object, created, model, choices[].index, message and finish_reason, and usage that adds up."""
    answer = api.chat()
    expect(answer.get("object") == "chat.completion", f"object is {answer.get('object')!r}")
    expect(all(key in answer for key in ("id", "created", "model", "usage")), f"fields: {sorted(answer)}")
    choice = answer["choices"][0]
    expect(choice["index"] == 0 and choice["message"]["role"] == "assistant", f"choice: {choice}")
    expect(choice["finish_reason"] in ("stop", "length"), f"finish_reason is {choice['finish_reason']!r}")
    usage = answer["usage"]
    expect(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"usage: {usage}")


@checks
def logprobs_not_asked_for(api: Caller) -> None:
    """choices[].logprobs is always there, null when it was not asked for."""
    expect(api.chat()["choices"][0].get("logprobs", "absent") is None, "logprobs is absent")


@checks
def max_tokens(api: Caller) -> None:
    """The answer has at most max_tokens tokens and finish_reason length when they are used up."""
    answer = api.chat(max_tokens=5)
    used = answer["usage"]["completion_tokens"]
    expect(used <= 5, f"{used} tokens")
    expect(used < 5 or answer["choices"][0]["finish_reason"] == "length", "the finish_reason is not length")


@checks
def max_completion_tokens(api: Caller) -> None:
    """The newer name of max_tokens."""
    used = api.chat(max_tokens=..., max_completion_tokens=5)["usage"]["completion_tokens"]
    expect(used <= 5, f"{used} tokens")


@checks
def max_tokens_beyond_the_context(api: Caller) -> None:
    """max_tokens is an upper limit: more than the context holds is answered, not refused."""
    with api.open_stream(max_tokens=50_000_000) as events:
        next(events)


@checks
def null_max_tokens(api: Caller) -> None:
    """Null stands for the default."""
    with api.open_stream(max_tokens=None) as events:
        next(events)


@checks
def null_temperature_and_top_p(api: Caller) -> None:
    """Null stands for the default."""
    api.chat(temperature=None, top_p=None)


@checks
def null_stop_seed_bias_n_tools(api: Caller) -> None:
    """Null stands for the default."""
    api.chat(stop=None, seed=None, logit_bias=None, n=None, user=None, tools=None)


@checks
def null_penalties(api: Caller) -> None:
    """Null stands for the default."""
    api.chat(presence_penalty=None, frequency_penalty=None)


@checks
def null_logprobs(api: Caller) -> None:
    """Null stands for the default."""
    api.chat(logprobs=None, top_logprobs=None)


@checks
def null_stream(api: Caller) -> None:
    """Null stands for the default."""
    api.chat(stream=None)


@checks
def temperature_zero_repeats(api: Caller) -> None:
    """Greedy answers are equal."""
    expect(content_of(api.chat()) == content_of(api.chat()), "two greedy answers differ")


@checks
def seed_repeats(api: Caller) -> None:
    """The same seed gives the same answer, another seed another one."""
    first, again, other = (content_of(api.chat(temperature=1, seed=seed)) for seed in (7, 7, 8))
    expect(first == again, "the same seed gave two answers")
    expect(first != other, "two seeds gave the same answer")


@checks
def stop_string(api: Caller) -> None:
    """The text ends before the first stop string, with finish_reason stop."""
    text = content_of(api.chat(max_tokens=16))
    usable = [letter for letter in text[len(text) // 2 :] if letter.isalnum()] or list(text[-1:])
    answer = api.chat(max_tokens=16, stop=[usable[0]])
    expect(content_of(answer) == text[: text.index(usable[0])], "the text goes on, or is cut elsewhere")
    expect(answer["choices"][0]["finish_reason"] == "stop", "the finish_reason is not stop")


@checks
def two_choices(api: Caller) -> None:
    """n=2 gives choices 0 and 1."""
    answer = api.chat(n=2, temperature=1)
    indices = [choice["index"] for choice in answer["choices"]]
    expect(indices == [0, 1], f"choices {indices}")


@checks
def logprobs_form(api: Caller) -> None:
    """logprobs.content has token, logprob, bytes and top_logprobs for every token of the text."""
    answer = api.chat(logprobs=True, top_logprobs=3, max_tokens=6)
    entries = answer["choices"][0]["logprobs"]["content"]
    for entry in entries:
        missing = {"token", "logprob", "bytes", "top_logprobs"} - entry.keys()
        expect(not missing, f"an entry lacks {', '.join(sorted(missing))}")
        expect(len(entry["top_logprobs"]) == 3, f"{len(entry['top_logprobs'])} alternatives")
    data = bytes(byte for entry in entries for byte in entry["bytes"] or ())
    expect(data.decode("utf-8", "replace") == content_of(answer), "the bytes of the tokens are not the text")


@checks
def logprobs_without_alternatives(api: Caller) -> None:
    """With logprobs alone, top_logprobs of every token is an empty list."""
    entries = api.chat(logprobs=True, max_tokens=4)["choices"][0]["logprobs"]["content"]
    expect(all(entry.get("top_logprobs") == [] and "token" in entry for entry in entries), f"entry: {entries[0]}")


@checks
def twenty_alternatives(api: Caller) -> None:
    """top_logprobs may be 0 to 20."""
    entries = api.chat(logprobs=True, top_logprobs=20, max_tokens=2)["choices"][0]["logprobs"]["content"]
    expect(len(entries[0]["top_logprobs"]) == 20, f"{len(entries[0]['top_logprobs'])} alternatives")


@checks
def logit_bias(api: Caller) -> None:
    """A bias of 100 makes a token the only one."""
    text = content_of(api.chat(logit_bias={"300": 100}, max_tokens=4))
    expect(bool(text) and text == text[: len(text) // 4] * 4, f"the text is {text!r}")


@checks
def penalties(api: Caller) -> None:
    """Penalties of 2 change a greedy answer that a bias keeps to twenty tokens."""
    bias = {str(token): 50 for token in range(300, 320)}
    text = content_of(api.chat(logit_bias=bias, frequency_penalty=2, presence_penalty=2, max_tokens=12))
    plain = content_of(api.chat(logit_bias=bias, max_tokens=12))
    expect(text != plain, "penalties change nothing")


@checks
def text_parts(api: Caller) -> None:
    """Content as a list of text parts is the same as one text."""
    words = QUESTION[0]["content"]
    parts = [{"type": "text", "text": words[:10]}, {"type": "text", "text": words[10:]}]
    answer = content_of(api.chat(messages=[{"role": "user", "content": parts}]))
    expect(answer == content_of(api.chat()), "the answer differs from the one to the same text")


@checks
def developer_role(api: Caller) -> None:
    """The role developer gives instructions, like system."""
    asked = [{"role": "developer", "content": "Answer in one word."}, *QUESTION]
    same = [{"role": "system", "content": "Answer in one word."}, *QUESTION]
    expect(content_of(api.chat(messages=asked)) == content_of(api.chat(messages=same)), "it is not read as system")


@checks
def usage_details(api: Caller) -> None:
    """usage has cached prompt tokens and reasoning tokens."""
    usage = api.chat()["usage"]
    expect("cached_tokens" in (usage.get("prompt_tokens_details") or {}), "no cached_tokens")
    expect("reasoning_tokens" in (usage.get("completion_tokens_details") or {}), "no reasoning_tokens")


@checks
def eight_at_once(api: Caller) -> None:
    """Requests at the same time get the answers that they get alone."""
    alone = content_of(api.chat())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: content_of(api.chat()), range(8)))
    expect(all(answer == alone for answer in answers), "an answer differs from the one given alone")


@checks
def models_list(api: Caller) -> None:
    """GET /v1/models lists models with id, object, created, owned_by."""
    listed = api.http.get("/v1/models").json()
    expect(listed["object"] == "list", f"object is {listed.get('object')!r}")
    missing = {"id", "object", "created", "owned_by"} - listed["data"][0].keys()
    expect(not missing, f"a model lacks {', '.join(sorted(missing))}")


@checks
def model_by_id(api: Caller) -> None:
    """GET /v1/models/{id} gives that model."""
    response = api.http.get(f"/v1/models/{api.model}")
    expect(response.status_code == 200, f"HTTP {response.status_code}")
    expect(response.json().get("id") == api.model, f"the answer's id is {response.json().get('id')!r}")
