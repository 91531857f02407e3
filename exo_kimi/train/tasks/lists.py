"""Sorting, counting and turning short lists; lists are drawn at random, so a held-out list was never seen."""

from __future__ import annotations

from random import Random

from exo_kimi.train.tasks.turn import Turn

WORDS = (
    "apple bread cat dog egg fish gold hat ice jar king lamp moon nest oil pen queen rain sun tree urn vase wind "
    "yard zoo ball cup door flag gate house island"
).split()
_COUNTS = "zero one two three four five six seven eight nine".split()


def sort_digits(rng: Random) -> Turn:
    """Three to six different digits, up or down."""
    digits = rng.sample(range(10), rng.randint(3, 6))
    falling = rng.random() < 0.4
    given = ", ".join(map(str, digits))
    phrases = (
        ("Sort {} from large to small.", "Put {} in falling order.")
        if falling
        else ("Sort {}.", "Put {} in order.", "Sort {} from small to large.")
    )
    result = ", ".join(map(str, sorted(digits, reverse=falling)))
    return Turn(
        task="sorting numbers",
        key=f"sort {given}",
        question=rng.choice(phrases).format(given),
        answer=f"{result}.",
        brief=f"{result}.",
    )


def sort_words(rng: Random) -> Turn:
    """Three to five words that begin with different letters."""
    words = _different(rng, rng.randint(3, 5))
    given, result = ", ".join(words), ", ".join(sorted(words))
    question = rng.choice(("Sort {} by the alphabet.", "Put the words {} in order.", "Sort the words {}.")).format(
        given
    )
    return Turn(task="sorting words", key=f"sort {given}", question=question, answer=f"{result}.", brief=f"{result}.")


def extreme(rng: Random) -> Turn:
    """The largest or smallest of some digits."""
    digits = rng.sample(range(10), rng.randint(3, 6))
    word, best = rng.choice((("largest", max(digits)), ("smallest", min(digits))))
    given = ", ".join(map(str, digits))
    question = rng.choice(("Which is the {} of {}?", "What is the {} of {}?")).format(word, given)
    return Turn(
        task="extremes",
        key=f"{word} {given}",
        question=question,
        answer=f"The {word} is {best}.",
        brief=f"{best}.",
    )


def count_words(rng: Random) -> Turn:
    """How many words a list has, counted aloud."""
    words = rng.sample(WORDS, rng.randint(2, 9))
    given = ", ".join(words)
    phrases = ("How many words are in the list {}?", "Count the words: {}.", "How many words are there: {}?")
    return Turn(
        task="counting",
        key=f"count {given}",
        question=rng.choice(phrases).format(given),
        answer=f"There are {_COUNTS[len(words)]} words.",
        reasoning=", ".join(f"{number} {word}" for number, word in enumerate(words, start=1)),
        brief=f"{_COUNTS[len(words)]}.",
    )


def place(rng: Random) -> Turn:
    """The first or last of a list."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    which, word = rng.choice((("first", words[0]), ("last", words[-1]), ("second", words[1])))
    given = ", ".join(words)
    return Turn(
        task="places",
        key=f"{which} {given}",
        question=rng.choice(("What is the {} word of {}?", "Which word is the {} in {}?")).format(which, given),
        answer=f"The {which} word is {word}.",
        brief=f"{word}.",
    )


def reverse(rng: Random) -> Turn:
    """A list, backwards."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    given, result = ", ".join(words), ", ".join(reversed(words))
    question = rng.choice(("Reverse the list {}.", "Say {} backwards.")).format(given)
    return Turn(task="reversing", key=f"reverse {given}", question=question, answer=f"{result}.", brief=f"{result}.")


def _different(rng: Random, count: int) -> list[str]:
    words: dict[str, str] = {}
    while len(words) < count:
        word = rng.choice(WORDS)
        words.setdefault(word[0], word)
    return list(words.values())
