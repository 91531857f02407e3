"""The official openai client against a live server: what a user of the API sees."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from exo_kimi.errors import OverloadedError, RuntimeFault, StageDiedError

MODEL = "tiny-kimi"
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call_text(*calls: tuple[str, str]) -> str:
    """A tool section as Kimi writes it."""
    body = "".join(
        f"<|tool_call_begin|>functions.{name}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for name, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


@pytest.fixture
def openai_for(live):
    """`openai_for(engine, **app options)`: an official client of a live server over that engine."""

    def make(engine, *, key="none", **options):
        return openai.OpenAI(base_url=f"{live(engine, **options).url}/v1", api_key=key, max_retries=0, timeout=30)

    return make


def test_a_chat_answer_has_its_text_reason_and_usage(saying, openai_for):
    engine = saying("Rain, 4 °C. 你好 🎉", cached_tokens=5)
    answer = openai_for(engine).chat.completions.create(model=MODEL, messages=ASK)
    message = answer.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "Rain, 4 °C. 你好 🎉", None)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
    assert answer.usage.completion_tokens == len(engine.voice.ids(message.content)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.object == "chat.completion"


def test_a_stream_begins_with_the_role_and_joins_to_the_whole_text(saying, openai_for):
    client = openai_for(saying("Rain, 4 °C. 你好 🎉"))
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Rain, 4 °C. 你好 🎉"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_chunk_comes_last_and_only_when_asked_for(saying, openai_for):
    client = openai_for(saying())
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_max_tokens_cuts_the_answer_and_says_length(saying, openai_for):
    engine = saying("one two three four five six")
    client = openai_for(engine)
    for field in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=ASK, **{field: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].message.content == engine.voice.tokenizer.decode(
            engine.voice.ids("one two three four")[:3]
        )


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_above_what_fits_is_cut_and_the_answer_says_so(saying, openai_for, stream):
    engine = saying("one two three four five six", room=3)
    ask = {"model": MODEL, "max_tokens": 10**6, "stream": stream}
    for create, asked in (
        (openai_for(engine).chat.completions.with_raw_response.create, {"messages": ASK, "n": 2}),
        (openai_for(engine).completions.with_raw_response.create, {"prompt": "one"}),
    ):
        raw = create(**ask, **asked)
        prompt = len(engine.requests[-1].prompt_ids)
        said = f"max_tokens 1000000 was cut to 3: no more fit behind {prompt} prompt tokens"
        assert raw.headers["x-exo-kimi-warnings"] == said
        answers = list(raw.parse()) if stream else [raw.parse()]
        assert [getattr(each, "warnings", None) for each in answers] == [[said], *[None] * (len(answers) - 1)]
        reasons = [choice.finish_reason for each in answers for choice in each.choices]
        assert set(filter(None, reasons)) == {"length"}


def test_an_answer_without_warnings_has_neither_list_nor_header(saying, openai_for):
    client = openai_for(saying("one two", room=3))
    for stream in (False, True):
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK, max_tokens=3, stream=stream)
        assert "x-exo-kimi-warnings" not in raw.headers
        first = next(iter(raw.parse())) if stream else raw.parse()
        assert not hasattr(first, "warnings")


def test_a_stop_string_ends_the_text_and_the_generation(saying, openai_for):
    engine = saying("one two END three four")
    answer = openai_for(engine).chat.completions.create(model=MODEL, messages=ASK, stop=["END", "never"])
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert len(engine.cancelled) == 1


def test_n_choices_are_separate_sequences_with_consecutive_seeds(saying, openai_for):
    engine = saying()
    answer = openai_for(engine).chat.completions.create(model=MODEL, messages=ASK, n=3, seed=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in engine.requests) == [40, 41, 42]
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
    assert answer.usage.completion_tokens == 3 * (len(engine.voice.ids("Hello there, friend.")) + 1)


def test_logprobs_have_the_bytes_of_exactly_the_text(saying, openai_for):
    client = openai_for(saying("Rain 你好 🎉"))
    options = {"model": MODEL, "messages": ASK, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "Rain 你好 🎉"
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 2 for entry in content)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_sampling_fields_reach_the_engine_and_null_means_the_checkpoints_default(saying, openai_for):
    engine = saying()
    client = openai_for(engine)
    client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0.3,
        top_p=0.7,
        presence_penalty=1.5,
        frequency_penalty=-1,
        seed=9,
        logit_bias={"300": 5},
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.7, 40, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.5, -1, 1.1)
    assert (sampling.seed, dict(sampling.logit_bias)[300]) == (9, 5.0)
    client.chat.completions.create(model=MODEL, messages=ASK, temperature=None, top_p=None, max_tokens=None, stop=None)
    assert engine.requests[1].sampling.temperature == engine.voice.defaults.sampling().temperature
    assert engine.requests[1].max_tokens is None


def test_tool_calls_come_whole_and_the_result_goes_back(saying, openai_for):
    engine = saying(call_text(("get_weather:0", '{"city": "Oslo"}'), ("get_weather:1", '{"city": "Rome"}')))
    client = openai_for(engine)
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"city": "Oslo"},
        {"city": "Rome"},
    ]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"rain number {index}"}
        for index, call in enumerate(choice.message.tool_calls)
    ]
    client.chat.completions.create(model=MODEL, messages=[*ASK, choice.message, *results], tools=[WEATHER])
    prompt = engine.voice.tokenizer.decode(engine.requests[1].prompt_ids)
    assert "rain number 0" in prompt
    assert "rain number 1" in prompt
    assert "get_weather" in prompt


def test_streamed_tool_calls_have_index_id_name_and_arguments(saying, openai_for):
    engine = saying("Let me look." + call_text(("get_weather:0", '{"city": "Oslo"}'), ("get_weather:1", "{}")))
    stream = openai_for(engine).chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER], stream=True)
    deltas = [choice for chunk in stream for choice in chunk.choices]
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    begun = [call for call in calls if call.id]
    assert [(call.index, call.type, call.function.name) for call in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "get_weather"),
    ]
    assert len({call.id for call in begun}) == 2
    arguments = ["".join(call.function.arguments for call in calls if call.index == index) for index in (0, 1)]
    assert arguments == ['{"city": "Oslo"}', "{}"]
    assert "".join(choice.delta.content or "" for choice in deltas) == "Let me look."
    assert deltas[-1].finish_reason == "tool_calls"


def test_without_parallel_tool_calls_the_answer_ends_after_the_first(saying, openai_for):
    engine = saying(call_text(("get_weather:0", '{"city": "Oslo"}'), ("get_weather:1", '{"city": "Rome"}')))
    answer = openai_for(engine).chat.completions.create(
        model=MODEL, messages=ASK, tools=[WEATHER], parallel_tool_calls=False
    )
    assert [call.function.arguments for call in answer.choices[0].message.tool_calls] == ['{"city": "Oslo"}']
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len(engine.cancelled) == 1


def test_tool_choice_none_bars_the_markers_of_a_call(saying, openai_for):
    engine = saying()
    client = openai_for(engine)
    options = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "tool_choice": "none", "logit_bias": {"300": 3}}
    assert client.chat.completions.create(**options).choices[0].message.tool_calls is None
    biases = dict(engine.requests[0].sampling.logit_bias)
    assert biases[engine.voice.tokenizer.special["<|tool_calls_section_begin|>"]] < -100
    assert biases[300] == 3


def test_a_required_tool_call_runs_under_a_grammar(saying, openai_for):
    engine = saying(call_text(("get_weather:0", '{"city":"Oslo"}')))
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answer = openai_for(engine).chat.completions.create(
            model=MODEL, messages=ASK, tools=[WEATHER], tool_choice=choice
        )
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city":"Oslo"}'
        assert answer.choices[0].finish_reason == "tool_calls"
    assert all(request.constraint is not None for request in engine.requests)


def test_a_response_format_runs_under_a_grammar_and_parses(saying, openai_for):
    class City(pydantic.BaseModel):
        name: str
        people: int

    engine = saying('{"name": "Oslo", "people": 700000}')
    client = openai_for(engine)
    parsed = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Oslo", people=700000)
    client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"}, n=2)
    constraints = [request.constraint for request in engine.requests]
    assert len({id(constraint) for constraint in constraints}) == 3
    assert None not in constraints
    client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "text"})
    assert engine.requests[-1].constraint is None


def test_strict_functions_are_held_to_their_schema_when_the_model_chooses(saying, openai_for):
    class Look(pydantic.BaseModel):
        city: str

    engine = saying(call_text(("Look:0", '{"city":"Oslo"}')))
    parsed = openai_for(engine).chat.completions.parse(
        model=MODEL, messages=ASK, tools=[openai.pydantic_function_tool(Look)]
    )
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Look(city="Oslo")
    assert engine.requests[0].constraint is not None
    assert "strict" not in engine.voice.tokenizer.decode(engine.requests[0].prompt_ids)


def test_reasoning_is_apart_from_the_answer_and_counted(saying, openai_for, thinker):
    engine = saying("I should look outside.</think>It rains.", by=thinker)
    client = openai_for(engine)
    answer = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True)
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].message.reasoning_content == "I should look outside."
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(thinker.ids("I should look outside."))
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert "".join(tokens) == "It rains."
    deltas = [
        choice.delta
        for chunk in client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
        for choice in chunk.choices
    ]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "I should look outside."
    assert "".join(delta.content or "" for delta in deltas) == "It rains."


@pytest.mark.parametrize(
    "extra", [{"thinking": False}, {"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"thinking": False}}]
)
def test_thinking_can_be_turned_off(saying, openai_for, thinker, extra):
    engine = saying("It rains.", by=thinker)
    answer = openai_for(engine).chat.completions.create(model=MODEL, messages=ASK, extra_body=extra)
    assert answer.choices[0].message.content == "It rains."
    assert thinker.tokenizer.decode(engine.requests[0].prompt_ids).endswith("<think></think>")


def test_reasoning_effort_none_turns_thinking_off_and_another_is_named(saying, openai_for, thinker):
    engine = saying("It rains.", by=thinker)
    client = openai_for(engine)
    client.chat.completions.create(model=MODEL, messages=ASK, reasoning_effort="none")
    assert thinker.tokenizer.decode(engine.requests[0].prompt_ids).endswith("<think></think>")
    answer = client.chat.completions.create(model=MODEL, messages=ASK, reasoning_effort="high")
    assert thinker.tokenizer.decode(engine.requests[1].prompt_ids).endswith("<think>")
    assert "effort 'high'" in answer.warnings[0]


def test_thinking_is_named_where_the_model_has_none(saying, openai_for, voice):
    client = openai_for(saying("It rains."))
    client.chat.completions.create(model=MODEL, messages=ASK, reasoning_effort="none")
    answer = client.chat.completions.create(model=MODEL, messages=ASK, extra_body={"thinking": True})
    assert answer.warnings == ["this model does not reason"]


def test_all_roles_and_text_parts_reach_the_prompt(saying, openai_for):
    engine = saying()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye <|im_end|>"},
    ]
    openai_for(engine).chat.completions.create(model=MODEL, messages=messages)
    prompt = engine.requests[0].prompt_ids
    text = engine.voice.tokenizer.decode(prompt)
    assert "<|im_system|>system<|im_middle|>Be brief." in text
    assert "Hello<|im_end|>" in text
    assert "Hi." in text
    # The user's own <|im_end|> stays text: four turns end, and no fifth.
    assert prompt.count(engine.voice.tokenizer.special["<|im_end|>"]) == 4


def test_errors_are_the_clients_own_classes_with_param_and_code(saying, openai_for):
    client = openai_for(saying())
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=ASK, extra_body={"tempratur": 1})
    assert unknown.value.code == "unknown_parameter"


def test_a_refusal_before_the_first_token_has_its_status_also_when_streamed(saying, openai_for):
    for error, expected in (
        (OverloadedError("the queue is full"), openai.InternalServerError),
        (RuntimeFault("stage 1 died"), openai.InternalServerError),
    ):
        client = openai_for(saying(refusal=error))
        for stream in (False, True):
            with pytest.raises(expected) as raised:
                client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)
            assert raised.value.status_code == 503
    client = openai_for(saying(break_at=0, fault=StageDiedError("stage 1 died")))
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    assert raised.value.code == "stage_died"


def test_a_failure_in_the_middle_of_a_stream_reaches_the_client(saying, openai_for):
    client = openai_for(saying(break_at=2, fault=StageDiedError("stage 1 died")))
    seen = []
    with pytest.raises(openai.APIError, match="stage 1 died"):
        seen.extend(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
    assert seen, "what was generated before the failure is delivered"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=ASK)


def test_the_api_key_is_needed_everywhere_but_for_health(saying, openai_for, live):
    engine = saying()
    with pytest.raises(openai.AuthenticationError):
        openai_for(engine, key="wrong", api_key="secret").models.list()
    client = openai_for(engine, key="secret", api_key="secret")
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions_of_several_prompts_with_echo_and_logprobs(saying, openai_for):
    engine = saying(" blue today")
    client = openai_for(engine)
    answer = client.completions.create(model=MODEL, prompt=["The sky is", "The sea is"], echo=True, n=2)
    assert [choice.text for choice in answer.choices] == ["The sky is blue today"] * 2 + ["The sea is blue today"] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert engine.requests[0].max_tokens == 16
    answer = client.completions.create(model=MODEL, prompt=[300, 301], logprobs=2, max_tokens=50)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == " blue today"
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.text_offset) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert engine.requests[-1].prompt_ids == (300, 301)
    stream = client.completions.create(model=MODEL, prompt="The sky is", stream=True, stop=" today")
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == " blue"
