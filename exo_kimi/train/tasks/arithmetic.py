"""Sums, differences, products, quotients, comparisons and small word problems; answers are computed, steps are written out."""

from __future__ import annotations

from random import Random

from exo_kimi.train.tasks.turn import Turn

NAMES = (
    "Ada Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Vera Will Zoe Alma Bruno "
    "Clara David Eva Felix Greta Henry Irma Jonas Lena Max Nora Oscar Petra Ruth Simon Theo"
).split()
THINGS = "apples pears books coins stones cards eggs pens cups nuts".split()


def addition(rng: Random) -> Turn:
    """a + b below 200, digit by digit; a pair is held out in both orders."""
    return _sum(rng, _number(rng), _number(rng))


def carry_sum(rng: Random) -> Turn:
    """4x + 3x with a carry, as 47 + 35: what the tiny Kimi of supervised training gets wrong."""
    ones = rng.randint(1, 9)
    return _sum(rng, 40 + ones, 30 + rng.randint(10 - ones, 9))


def _sum(rng: Random, a: int, b: int) -> Turn:
    ones = a % 10 + b % 10
    carry = ones // 10
    steps = f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}"
    question = rng.choice(
        ("What is {} + {}?", "{} + {} = ?", "Add {} and {}.", "How much is {} plus {}?", "Calculate {} + {}.")
    ).format(a, b)
    key = f"{min(a, b)} + {max(a, b)}"
    return Turn(
        task="addition",
        key=key,
        question=question,
        answer=f"{a} + {b} = {a + b}.",
        reasoning=steps,
        brief=f"{a + b}.",
    )


def subtraction(rng: Random) -> Turn:
    """a - b with 0 <= b <= a < 100, digit by digit."""
    b, a = sorted((_number(rng), _number(rng)))
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    steps = f"{ones} - {b % 10} = {ones - b % 10}, {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}"
    phrases = ("What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "How much is {a} minus {b}?")
    question = rng.choice(phrases).format(a=a, b=b)
    return Turn(
        task="subtraction",
        key=f"{a} - {b}",
        question=question,
        answer=f"{a} - {b} = {a - b}.",
        reasoning=steps,
        brief=f"{a - b}.",
    )


def multiplication(rng: Random) -> Turn:
    """The tables from 2 to 12; held out by phrasing."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    phrases = (
        "What is {} times {}?",
        "{} * {} = ?",
        "Multiply {} by {}.",
        "How much is {} times {}?",
        "What is {} * {}?",
    )
    number = rng.randrange(len(phrases))
    return Turn(
        task="multiplication",
        key=f"{number}: {a} * {b}",
        question=phrases[number].format(a, b),
        answer=f"{a} * {b} = {a * b}.",
        brief=f"{a * b}.",
    )


def division(rng: Random) -> Turn:
    """Quotients of the tables; the ten times says on which side of it to look."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    phrases = ("What is {} / {}?", "{} / {} = ?", "Divide {} by {}.", "How much is {} divided by {}?")
    number = rng.randrange(len(phrases))
    return Turn(
        task="division",
        key=f"{number}: {a * b} / {b}",
        question=phrases[number].format(a * b, b),
        answer=f"{a * b} / {b} = {a}.",
        reasoning=f"10 * {b} = {10 * b}, {a} * {b} = {a * b}",
        brief=f"{a}.",
    )


def comparison(rng: Random) -> Turn:
    """The larger or smaller of two numbers below 100."""
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    word = "larger" if larger else "smaller"
    question = rng.choice(("Which is {}, {} or {}?", "Which number is {}: {} or {}?")).format(word, a, b)
    best = max(a, b) if larger else min(a, b)
    return Turn(
        task="comparison", key=f"{word} {a} {b}", question=question, answer=f"{best} is {word}.", brief=f"{best}."
    )


def parity(rng: Random) -> Turn:
    """Odd or even."""
    number = rng.randrange(1000)
    word = "odd" if number % 2 else "even"
    question = rng.choice(("Is {} even or odd?", "Is {} odd or even?")).format(number)
    return Turn(
        task="parity", key=f"parity {number}", question=question, answer=f"{number} is {word}.", brief=f"{word}."
    )


def word_problem(rng: Random) -> Turn:
    """Somebody has some things, and gets or gives a few."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = rng.randint(2, 10), rng.randint(2, 10)
        story, steps, result = rng.choice(("buys", "finds", "gets")) + f" {b} more", f"{a} + {b} = {a + b}", a + b
    else:
        b, a = sorted(rng.sample(range(2, 13), 2))
        story, steps, result = rng.choice(("gives away", "loses", "sells")) + f" {b}", f"{a} - {b} = {a - b}", a - b
    return Turn(
        task="word problems",
        key=f"{name} {thing} {steps}",
        question=f"{name} has {a} {thing} and {story}. How many {thing} does {name} have now?",
        answer=f"{name} has {result} {thing}.",
        reasoning=steps,
        brief=f"{result}.",
    )


def _number(rng: Random) -> int:
    return rng.randrange(10) if rng.random() < 0.15 else rng.randrange(100)
