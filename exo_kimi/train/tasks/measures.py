"""Units, weekdays, months and dates; answers are computed from a few tables."""

from __future__ import annotations

from random import Random

from exo_kimi.train.tasks.turn import Turn

_POWERS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("l", "ml", 1000),
    ("euros", "cents", 100),
)
_TABLES = (("weeks", "days", 7), ("hours", "minutes", 60), ("minutes", "seconds", 60), ("years", "months", 12))
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def conversion(rng: Random) -> Turn:
    """From a larger unit to a smaller one."""
    power = rng.random() < 0.6
    larger, smaller, factor = rng.choice(_POWERS if power else _TABLES)
    count = rng.randint(2, 99) if power else rng.randint(2, 12)
    phrases = ("How many {s} are {n} {l}?", "Convert {n} {l} to {s}.", "{n} {l} in {s}?", "What is {n} {l} in {s}?")
    number = rng.randrange(len(phrases))
    result = f"{count * factor} {smaller}"
    return Turn(
        task="unit conversion",
        key=f"{count} {larger} {smaller}" if power else f"{number}: {count} {larger} {smaller}",
        question=phrases[number].format(s=smaller, n=count, l=larger),
        answer=f"{count} {larger} are {result}.",
        reasoning=f"{count} * {factor} = {count * factor}",
        brief=f"{result}.",
    )


def weekday(rng: Random) -> Turn:
    """Days after or before a weekday, counted one by one."""
    start, count = rng.randrange(7), rng.randint(1, 7)
    sign, word = (1, "after") if rng.random() < 0.6 else (-1, "before")
    walk = [WEEKDAYS[(start + sign * step) % 7] for step in range(1, count + 1)]
    days = "1 day" if count == 1 else f"{count} days"
    phrases = ("Which day is {} {} {}?", "What day is {} {} {}?", "What weekday is {} {} {}?")
    number = rng.randrange(len(phrases))
    return Turn(
        task="weekdays",
        key=f"{number}: {days} {word} {WEEKDAYS[start]}",
        question=phrases[number].format(days, word, WEEKDAYS[start]),
        answer=f"It is {walk[-1]}.",
        reasoning=", ".join(f"{step} {day}" for step, day in enumerate(walk, start=1)),
        brief=f"{walk[-1]}.",
    )


def month(rng: Random) -> Turn:
    """The order of the months and their days."""
    kind, index = rng.randrange(4), rng.randrange(12)
    name, following, previous = MONTHS[index], MONTHS[(index + 1) % 12], MONTHS[index - 1]
    questions, answer, brief = (
        (
            ("Which month comes after {}?", "What month follows {}?", "What is the month after {}?"),
            following,
            following,
        ),
        (
            ("Which month comes before {}?", "What is the month before {}?", "What month precedes {}?"),
            previous,
            previous,
        ),
        (("How many days does {} have?", "How many days are in {}?", "How long is {}?"), "", f"{_DAYS[index]} days"),
        (("What is the {} month?", "Which month is the {}?", "Name the {} month."), name, name),
    )[kind]
    number = rng.randrange(len(questions))
    subject = _ORDINALS[index] if kind == 3 else name
    return Turn(
        task="months",
        key=f"month {kind} {number} {index}",
        question=questions[number].format(subject),
        answer=f"It is {answer}." if answer else f"{name} has {brief}.",
        brief=f"{brief}.",
    )


def next_date(rng: Random) -> Turn:
    """The day after a date of a year that is no leap year."""
    index = rng.randrange(12)
    last = _DAYS[index]
    day = last if rng.random() < 0.2 else rng.randint(1, last - 1)
    if day == last:
        steps, result = f"{MONTHS[index]} has {last} days, {day} is the last", f"{MONTHS[(index + 1) % 12]} 1"
    else:
        steps, result = f"{MONTHS[index]} has {last} days, {day} + 1 = {day + 1}", f"{MONTHS[index]} {day + 1}"
    phrases = ("Which date is the day after {} {}?", "What comes after {} {}?", "What is the date after {} {}?")
    number = rng.randrange(len(phrases))
    return Turn(
        task="dates",
        key=f"{number}: after {MONTHS[index]} {day}",
        question=phrases[number].format(MONTHS[index], day),
        answer=f"It is {result}.",
        reasoning=steps,
        brief=f"{result}.",
    )
