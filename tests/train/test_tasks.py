"""The texts: answers are right, held-out questions are never trained on, numbers are spelled by digits."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.data import conversations
from exo_kimi.train.data.conversations import training_conversation
from exo_kimi.train.evaluation.cases import question_cases, tool_cases
from exo_kimi.train.tasks import arithmetic, facts, lists, measures, tools
from exo_kimi.train.tasks.registry import SHARES
from exo_kimi.train.tasks.turn import draw, held_out

ARITHMETIC = (arithmetic.addition, arithmetic.subtraction, arithmetic.multiplication, arithmetic.division)


@pytest.mark.parametrize("task", ARITHMETIC)
def test_sums_are_right_and_so_is_every_step(task: arithmetic.Turn) -> None:
    rng = Random(0)
    for _ in range(300):
        turn = task(rng)
        equations = [turn.answer.rstrip("."), *filter(None, turn.reasoning.split(", "))]
        for equation in equations:
            left, right = equation.split(" = ")
            assert eval(left) == int(right), turn
        assert turn.brief == f"{eval(turn.answer.split(' = ')[0]):.0f}."


def test_lists_are_sorted_and_counted() -> None:
    rng = Random(0)
    for _ in range(200):
        turn = lists.sort_words(rng)
        words = turn.answer.rstrip(".").split(", ")
        assert words == sorted(words)
        assert set(words) <= set(re.findall(r"\w+", turn.question))
        counted = lists.count_words(rng)
        assert lists._COUNTS[counted.reasoning.count(",") + 1] in counted.answer


def test_dates_follow_each_other() -> None:
    rng = Random(0)
    for _ in range(200):
        turn = measures.next_date(rng)
        month, day = re.search(r"after (\w+) (\d+)", turn.key).groups()
        told, number = re.search(r"It is (\w+) (\d+)", turn.answer).groups()
        follows = int(number) == int(day) + 1 and told == month
        begins = number == "1" and measures.MONTHS.index(told) == (measures.MONTHS.index(month) + 1) % 12
        assert follows != begins, turn


def test_every_fact_can_be_trained_on() -> None:
    for relation, rows in facts.table().items():
        ways, _ = facts._WAYS[relation]
        for subject, thing in rows.items():
            assert thing
            keys = [f"{relation} {way} {subject}" for way in range(len(ways))]
            assert not all(map(held_out, keys)) or not held_out(f"{keys[0]} kept"), subject


def test_no_training_text_holds_a_held_out_question(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = question_cases(40, seed=0)
    asked = {str(case.messages[-1]["content"]) for case in cases if len(case.messages) == 1}
    requested = {case.request.question for case in tool_cases(40, seed=0)}
    rng = Random(5)
    trained = [training_conversation(rng) for _ in range(4000)]
    said = [message["content"] for talk in trained for message in talk.messages if message["role"] == "user"]
    assert len(asked) > 500
    assert not asked & set(said)
    assert not requested & set(said)


def test_both_sides_of_the_split_have_every_task() -> None:
    rng = Random(1)
    for task in SHARES:
        assert not held_out(draw(task, rng, evaluation=False).key)
    tasks = {case.task for case in question_cases(3, seed=1)}
    assert {"addition", "capitals", "facts", "stories", "dialogues", "system prompts", "dates"} <= tasks


def test_calculations_and_their_results_agree() -> None:
    rng = Random(0)
    for _ in range(100):
        request = tools.calculation(rng)
        assert eval(request.arguments["expression"]) == int(request.result)
        assert request.result in request.answer
        forecast = json.loads(tools.weather(rng).result)
        assert set(forecast) == {"sky", "degrees"}


def test_call_ids_count_over_the_conversation() -> None:
    rng = Random(0)
    while True:
        talk = conversations.training_conversation(rng)
        calls = [call["id"] for message in talk.messages for call in message.get("tool_calls", ())]
        if len(calls) > 2:
            break
    assert [call.split(":")[1] for call in calls] == [str(number) for number in range(len(calls))]


def test_numbers_are_spelled_by_digits(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    assert [tokenizer.decode([token]) for token in tokenizer.encode("3057")] == ["3", "0", "5", "7"]
    assert len(tokenizer.encode(" the")) == 1
