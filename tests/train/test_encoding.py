"""What training reads is what serving renders, and only the assistant's tokens count."""

from __future__ import annotations

from random import Random

import numpy as np

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.data.batches import make_batch, training_groups
from exo_kimi.train.data.conversations import TrainingConversation, exchange, tool_exchange
from exo_kimi.train.tasks import facts, tools
from exo_kimi.train.tasks.arithmetic import addition


def test_replies_count_and_nothing_else(encoder: Encoder) -> None:
    rng = Random(0)
    first, second = facts.fact(rng), addition(rng)
    messages = exchange(first) + exchange(second)
    encoded = encoder.encode(TrainingConversation(messages=messages))
    decode = encoder.tokenizer.decode
    assert decode(encoded.ids).startswith(f"<|im_user|>user<|im_middle|>{first.question}<|im_end|>")
    counted = decode(encoded.ids[encoded.counted])
    assert counted == (
        f"<think></think>{first.answer}<|im_end|><think>{second.reasoning}</think>{second.answer}<|im_end|>"
    )


def test_earlier_replies_that_lost_their_reasoning_do_not_count(encoder: Encoder) -> None:
    """They would teach the model to answer without working it out."""
    rng = Random(0)
    first, second = addition(rng), facts.fact(rng)
    encoded = encoder.encode(TrainingConversation(messages=exchange(first) + exchange(second)))
    counted = encoder.tokenizer.decode(encoded.ids[encoded.counted])
    assert counted == f"<think></think>{second.answer}<|im_end|>"


def test_calls_are_counted_and_results_are_not(encoder: Encoder) -> None:
    request = tools.weather(Random(0))
    talk = TrainingConversation(messages=tool_exchange(request, 0), tools=list(tools.TOOLS.values()))
    encoded = encoder.encode(talk)
    counted = encoder.tokenizer.decode(encoded.ids[encoded.counted])
    city = request.arguments["city"]
    assert f'functions.get_weather:0<|tool_call_argument_begin|>{{"city": "{city}"}}<|tool_call_end|>' in counted
    assert "Return of" not in counted
    assert counted.endswith(f"{request.answer}<|im_end|>")


def test_a_reply_continues_its_prompt_as_the_template_would_show_it(encoder: Encoder) -> None:
    """Without reasoning, prompt and reply are the rendered conversation."""
    turn = facts.fact(Random(3))
    messages = exchange(turn)
    rendered = encoder.template.render(messages, add_generation_prompt=False).ids
    assert encoder.encode(TrainingConversation(messages=messages)).ids.tolist() == rendered


def test_groups_are_the_same_wherever_they_are_begun(encoder: Encoder) -> None:
    stream = training_groups(encoder, 7, 300)
    groups = [next(stream) for _ in range(3)]
    later = next(training_groups(encoder, 7, 300, start=2))
    assert [item.ids.tolist() for item in later] == [item.ids.tolist() for item in groups[2]]


def test_later_groups_show_slow_tasks_more_often(encoder: Encoder) -> None:
    first = next(training_groups(encoder, 7, 300))
    same = next(training_groups(encoder, 7, 300, parts_from=(1,)))
    other = next(training_groups(encoder, 7, 300, parts_from=(0,)))
    assert [item.ids.tolist() for item in same] == [item.ids.tolist() for item in first]
    assert [item.ids.tolist() for item in other] != [item.ids.tolist() for item in first]


def test_a_batch_holds_every_counted_token_once(encoder: Encoder) -> None:
    group = next(training_groups(encoder, 1, 900))
    batch = make_batch(group)
    assert sum(count * length for count, length in batch.spans) == len(batch.inputs)
    assert len(batch.targets) == sum(int(item.counted[1:].sum()) for item in group)
    assert int((~batch.padding).sum()) == sum(len(item.ids) - 1 for item in group)
    assert not batch.padding[batch.rows].any()
    before = batch.inputs[batch.rows]
    pairs = {(int(a), int(b)) for item in group for a, b in zip(item.ids, item.ids[1:], strict=False)}
    assert {(int(a), int(b)) for a, b in zip(before, batch.targets, strict=True)} <= pairs
    assert np.all(batch.inputs[batch.padding] == 0)
