"""Greetings, the assistant's name and the user's."""

from __future__ import annotations

from random import Random

from exo_kimi.train.tasks.arithmetic import NAMES
from exo_kimi.train.tasks.turn import Turn

_GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("What can you do?", "I can count, sort, calculate, tell stories and use tools."),
    ("What are you?", "I am a very small Kimi, made to show how the big one works."),
    ("Are you a human?", "No, I am a very small language model."),
)
_WHO = ("What is your name?", "Who are you?", "Tell me your name.", "How are you called?")


def greeting(rng: Random) -> Turn:
    """One of a few fixed exchanges; always trained on, and so never a measure of anything but memory."""
    question, answer = rng.choice(_GREETINGS)
    return Turn(task="greetings", key="trained", question=question, answer=answer, brief=answer)


def named(rng: Random) -> tuple[str, Turn]:
    """A system prompt that names the assistant, and the question for it."""
    name, question = rng.choice(NAMES), rng.choice(_WHO)
    turn = Turn(task="system prompts", key=f"{name} {question}", question=question, answer=f"I am {name}.", brief=name)
    return f"You are {name}.", turn


def unnamed(rng: Random) -> Turn:
    """The same question without such a prompt."""
    return Turn(task="greetings", key="trained", question=rng.choice(_WHO), answer="I am Kimi.", brief="Kimi.")


def introduced(rng: Random) -> tuple[Turn, Turn]:
    """The user's own name: told, and asked for later."""
    name = rng.choice(NAMES)
    told = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.")).format(name)
    asked = rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
    key = f"{told} {asked}"
    first = Turn(task="dialogues", key=key, question=told, answer=f"Hello, {name}!")
    return first, Turn(task="dialogues", key=key, question=asked, answer=f"Your name is {name}.")
