"""Tasks of exo as sequences, and generated tokens as exo's chunks; without exo and without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.plugin.runner.chunks import ChunkWriter
from exo_kimi.plugin.runner.task import conversation_of_task, prepare_task
from exo_kimi.runtime.requests import TokenEvent

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}, "strict": True}}
CALL = (
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo"}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)
Write = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def speaker(tiny: Path) -> Speaker:
    return Speaker.from_directory(tiny)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    """A checkpoint whose prompts end inside reasoning."""
    directory = make_tiny(tmp_path_factory.mktemp("thinker") / "kimi", config={"num_hidden_layers": 2}, template="k25")
    return Speaker.from_directory(directory)


@pytest.fixture
def prepared(exo_shapes: ModuleType, speaker: Speaker) -> Callable[..., PreparedRequest]:
    return lambda prompt="Hi", **options: prepare_task("t", exo_shapes.task_params(prompt, **options), speaker)


@pytest.fixture
def write(exo_shapes: ModuleType) -> Write:
    """The chunks of a reply whose text is given; control tokens by their names."""

    def run(speaker: Speaker, task: PreparedRequest, reply: str, *, end: str | None = "<|im_end|>") -> list[Any]:
        writer = ChunkWriter(exo_shapes.exo_types(), "lab/k2", task, speaker.tokenizer, peak_bytes=lambda: 9)
        decoder = task.choices[0].decoder
        ids = encode(speaker, reply) + ([speaker.tokenizer.special[end]] if end else [])
        chunks: list[Any] = []
        for place, token_id in enumerate(ids):
            reason = None if place < len(ids) - 1 else "stop" if end else "length"
            token = TokenEvent(token_id=token_id, finish_reason=reason, logprob=-0.5)  # type: ignore[arg-type]
            chunks += writer.write(token, decoder.feed(token))
            if decoder.satisfied:
                break
        return chunks + writer.write(None, decoder.finish())

    return run


def encode(speaker: Speaker, text: str) -> list[int]:
    ids: list[int] = []
    while text:
        name = next((each for each in speaker.tokenizer.special if text.startswith(each)), None)
        if name is not None:
            ids.append(speaker.tokenizer.special[name])
            text = text.removeprefix(name)
        else:
            cut = min((text.find(each) for each in speaker.tokenizer.special if each in text), default=len(text))
            ids += speaker.tokenizer.encode(text[:cut])
            text = text[cut:]
    return ids


def test_text_comes_as_it_is_generated_and_usage_with_the_end(
    speaker: Speaker, prepared: Callable[..., PreparedRequest], write: Write
) -> None:
    task = prepared()
    chunks = write(speaker, task, "Blue 看见 sky")
    assert "".join(chunk.text for chunk in chunks) == "Blue 看见 sky"
    assert {(chunk.kind, chunk.model, chunk.is_thinking) for chunk in chunks[:-1]} == {("TokenChunk", "lab/k2", False)}
    last = chunks[-1]
    generated = len(speaker.tokenizer.encode("Blue 看见 sky")) + 1
    prompt = len(task.choices[0].request.prompt_ids)
    assert (last.finish_reason, last.usage.prompt_tokens, last.usage.completion_tokens) == ("stop", prompt, generated)
    assert last.stats.peak_memory_usage == 9
    assert all(chunk.finish_reason is None for chunk in chunks[:-1] if hasattr(chunk, "finish_reason"))


def test_a_reply_that_is_cut_says_length(
    speaker: Speaker, prepared: Callable[..., PreparedRequest], write: Write
) -> None:
    assert write(speaker, prepared(), "Blue sky", end=None)[-1].finish_reason == "length"


def test_a_stop_string_ends_the_reply_and_is_not_shown(
    speaker: Speaker, prepared: Callable[..., PreparedRequest], write: Write
) -> None:
    chunks = write(speaker, prepared(stop="sky"), "Blue sky and more")
    assert "".join(chunk.text for chunk in chunks) == "Blue "
    assert chunks[-1].finish_reason == "stop"


def test_tool_calls_come_last_in_one_chunk(
    speaker: Speaker, prepared: Callable[..., PreparedRequest], write: Write
) -> None:
    """exo's API ends a reply at the first chunk with a finish reason, so what follows a call would be lost."""
    chunks = write(speaker, prepared(tools=[TOOL]), f"Let me see.{CALL}")
    assert "".join(chunk.text for chunk in chunks[:-1]) == "Let me see."
    (call,) = chunks[-1].tool_calls
    assert chunks[-1].kind == "ToolCallChunk"
    assert (call.id, call.name, json.loads(call.arguments)) == (
        "functions.get_weather:0",
        "get_weather",
        {"city": "Oslo"},
    )


def test_without_tools_a_call_is_text_and_nothing_is_lost(
    speaker: Speaker, prepared: Callable[..., PreparedRequest], write: Write
) -> None:
    chunks = write(speaker, prepared(), CALL)
    assert "".join(chunk.text for chunk in chunks) == CALL
    assert chunks[-1].kind == "TokenChunk"


def test_reasoning_is_marked_and_counted(thinker: Speaker, exo_shapes: ModuleType, write: Write) -> None:
    task = prepare_task("t", exo_shapes.task_params("Hi", enable_thinking=True), thinker)
    chunks = write(thinker, task, "Hmm, well.</think>Yes.")
    thoughts = [chunk for chunk in chunks[:-1] if chunk.is_thinking]
    assert "".join(chunk.text for chunk in thoughts) == "Hmm, well."
    assert "".join(chunk.text for chunk in chunks[:-1] if not chunk.is_thinking) == "Yes."
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens >= len(thinker.tokenizer.encode("Hmm, well."))


def test_what_the_client_chose_goes_before_what_the_checkpoint_recommends(
    prepared: Callable[..., PreparedRequest], speaker: Speaker
) -> None:
    chosen = (
        prepared(temperature=0.2, top_k=5, seed=3, max_output_tokens=9, logprobs=True, top_logprobs=2)
        .choices[0]
        .request
    )
    assert (chosen.sampling.temperature, chosen.sampling.top_k, chosen.sampling.seed) == (0.2, 5, 3)
    assert (chosen.max_tokens, chosen.sampling.logprobs, chosen.sampling.top_logprobs) == (9, True, 2)
    assert prepared(temperature=None).choices[0].request.sampling.temperature == speaker.defaults.sampling().temperature


def test_exos_0_and_ollamas_minus_1_are_no_limit(prepared: Callable[..., PreparedRequest]) -> None:
    limits = {each: prepared(max_output_tokens=each).choices[0].request.max_tokens for each in (None, 0, -1, -2, 1)}
    assert limits == {None: None, 0: None, -1: None, -2: None, 1: 1}


def test_a_bench_goes_on_at_the_end_of_a_turn_and_uses_no_cache(prepared: Callable[..., PreparedRequest]) -> None:
    plain, bench, with_cache, endless = (
        prepared(max_output_tokens=limit, **options).choices[0].request
        for limit, options in (
            (9, {}),
            (9, {"bench": True}),
            (9, {"bench": True, "use_prefix_cache": True}),
            (None, {"bench": True}),
        )
    )
    assert (bool(plain.stop_ids), plain.use_prefix_cache) == (True, True)  # exo's other routes leave the field false
    assert (bool(bench.stop_ids), bench.use_prefix_cache) == (False, False)
    assert (bool(with_cache.stop_ids), with_cache.use_prefix_cache) == (False, True)
    assert bool(endless.stop_ids)  # or it would not end before the context is full


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reasoning_effort": "high", "enable_thinking": True}, "reasoning_effort high"),
        ({"repetition_context_size": 20, "repetition_penalty": 1.1}, "repetition_context_size"),
        ({"prefill_endpoint": "http://node:1"}, "prefill_endpoint"),
        (
            {"tools": [TOOL, {"type": "function", "function": {"name": "", "parameters": {}}}]},
            "tools other than functions",
        ),
        ({"tools": [TOOL]}, None),
        ({"reasoning_effort": "none", "enable_thinking": False}, None),
        ({"repetition_context_size": 20}, None),
    ],
)
def test_what_exo_hands_on_and_we_do_not_do_is_named(
    prepared: Callable[..., PreparedRequest], options: dict[str, Any], named: str | None
) -> None:
    warnings = prepared(**options).warnings
    assert sum(named in each for each in warnings) == 1 if named else warnings == ()


def test_an_effort_alone_turns_thinking_on_or_off(exo_shapes: ModuleType) -> None:
    tasks = [exo_shapes.task_params("Hi", reasoning_effort=effort) for effort in ("none", "low")]
    assert [conversation_of_task("t", task).thinking for task in tasks] == [False, True]


def test_the_prompt_is_the_templates_with_every_message(
    prepared: Callable[..., PreparedRequest], speaker: Speaker
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "functions.f:0",
                    "type": "function",
                    "function": {"id": "functions.f:0", "name": "f", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "42"},
    ]
    shown = speaker.tokenizer.decode(prepared(chat_template_messages=messages).choices[0].request.prompt_ids)
    assert "Be brief." in shown and "functions.f:0" in shown and "42" in shown


def test_exos_other_apis_give_input_and_instructions(
    prepared: Callable[..., PreparedRequest], speaker: Speaker
) -> None:
    class Message:
        role, content = "user", "Hello"

    task = prepared(chat_template_messages=None, instructions="Be brief.", input=[Message()])
    shown = speaker.tokenizer.decode(task.choices[0].request.prompt_ids)
    assert "Be brief." in shown and "Hello" in shown


def test_a_begun_reply_is_gone_on_with(prepared: Callable[..., PreparedRequest], speaker: Speaker) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    ids = prepared(chat_template_messages=messages).choices[0].request.prompt_ids
    assert speaker.tokenizer.decode(ids).endswith("Once upon")
    assert ids[: len(prepared().choices[0].request.prompt_ids)] == prepared().choices[0].request.prompt_ids


def test_images_and_malformed_messages_are_refused(prepared: Callable[..., PreparedRequest]) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}
    with pytest.raises(UnsupportedError, match="images are not supported"):
        prepared(images=["aGk="], chat_template_messages=[message])
    for images in ([], ["aGk=", "aGk="]):
        with pytest.raises(RequestError, match="other pictures"):
            prepared(images=images, chat_template_messages=[message])
    with pytest.raises(RequestError):
        prepared(chat_template_messages=[{"role": "user", "content": 5}])
