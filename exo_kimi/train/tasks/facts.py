"""A few hundred facts, each asked in several ways; every fact is trained on, some of its ways of being asked are not."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from random import Random

from exo_kimi.train.tasks.turn import Turn, held_out

# Relation -> ways to ask, and the answer.
_WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "capital": (
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}.",
            "What is {}'s capital?",
        ),
        "The capital of {} is {}.",
    ),
    "continent": (
        (
            "On which continent is {}?",
            "Where is {}?",
            "Which continent is {} in?",
            "In which part of the world is {}?",
        ),
        "{} is in {}.",
    ),
    "opposite": (
        (
            "What is the opposite of {}?",
            "Name the opposite of {}.",
            "Which word is the opposite of {}?",
            "Give me the opposite of {}.",
        ),
        "The opposite of {} is {}.",
    ),
    "young": (
        (
            "What is a young {} called?",
            "What do you call a young {}?",
            "What is a baby {} called?",
            "Name the young of a {}.",
        ),
        "A young {} is called {}.",
    ),
    "sound": (
        ("What sound does a {} make?", "What does a {} say?", "Which sound does a {} make?", "How does a {} sound?"),
        "A {} says {}.",
    ),
    "colour": (
        ("What colour is {}?", "Which colour is {}?", "What is the colour of {}?", "Tell me the colour of {}."),
        "The colour of {} is {}.",
    ),
    "symbol": (
        (
            "What is the symbol of {}?",
            "What is the chemical symbol of {}?",
            "Which symbol does {} have?",
            "Name the symbol of {}.",
        ),
        "The symbol of {} is {}.",
    ),
    "past": (
        (
            "What is the past of {}?",
            "What is the past tense of {}?",
            "Name the past of {}.",
            "Put {} in the past tense.",
        ),
        "The past of {} is {}.",
    ),
    "plural": (
        (
            "What is the plural of {}?",
            "Name the plural of {}.",
            "Which word is the plural of {}?",
            "Tell me the plural of {}.",
        ),
        "The plural of {} is {}.",
    ),
    "legs": (
        (
            "How many legs does {} have?",
            "How many legs has {}?",
            "Count the legs of {}.",
            "What number of legs does {} have?",
        ),
        "The legs of {}: {}.",
    ),
    "language": (
        (
            "Which language is spoken in {}?",
            "What language do people speak in {}?",
            "What is the language of {}?",
            "Name the language of {}.",
        ),
        "The language of {} is {}.",
    ),
    "planet": (
        (
            "What is the {} planet?",
            "Which planet is the {} from the sun?",
            "Name the {} planet.",
            "Tell me the {} planet from the sun.",
        ),
        "The {} planet is {}.",
    ),
    "home": (
        ("Where does {} live?", "What is the home of {}?", "In what does {} live?", "Name the home of {}."),
        "The home of {} is {}.",
    ),
    "use": (
        ("What is {} for?", "What do you use {} for?", "What is the use of {}?", "What can I do with {}?"),
        "The use of {} is {}.",
    ),
}


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, str]]:
    """Relation -> subject -> object."""
    text = resources.files("exo_kimi.train").joinpath("data", "facts.txt").read_text(encoding="utf-8")
    relations: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            entries = relations.setdefault(line.strip("[]"), {})
        else:
            entries.update((key.strip(), value.strip()) for key, value in (item.split("=") for item in line.split(";")))
    return relations


@lru_cache(maxsize=1)
def _all() -> list[tuple[str, str, str]]:
    return [(relation, subject, thing) for relation, rows in table().items() for subject, thing in rows.items()]


def fact(rng: Random) -> Turn:
    """One of the facts in one of its ways."""
    relation, subject, thing = rng.choice(_all())
    ways, answer = _WAYS[relation]
    keys = [f"{relation} {way} {subject}" for way in range(len(ways))]
    number = rng.randrange(len(ways))
    if all(held_out(key) for key in keys):
        keys[0] += " kept"  # a fact that was never trained on cannot be asked
    return Turn(
        task="capitals" if relation == "capital" else "facts",
        key=keys[number],
        question=ways[number].format(subject),
        answer=answer.format(subject, thing),
        brief=f"{thing}.",
    )
