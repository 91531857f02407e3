"""Every single-turn task with its share of the training text."""

from __future__ import annotations

from exo_kimi.train.tasks import arithmetic, facts, lists, manners, measures, stories
from exo_kimi.train.tasks.turn import Task

SHARES: dict[Task, float] = {
    arithmetic.addition: 3.0,
    arithmetic.subtraction: 3.0,
    arithmetic.multiplication: 1.5,
    arithmetic.division: 1.5,
    arithmetic.comparison: 1.5,
    arithmetic.parity: 0.7,
    arithmetic.word_problem: 1.2,
    measures.conversion: 2.0,
    measures.weekday: 2.0,
    measures.month: 1.2,
    measures.next_date: 1.5,
    lists.sort_digits: 2.5,
    lists.sort_words: 2.0,
    lists.extreme: 1.0,
    lists.count_words: 1.0,
    lists.place: 1.0,
    lists.reverse: 1.0,
    facts.fact: 7.0,
    stories.story: 1.2,
    manners.greeting: 0.5,
    manners.unnamed: 0.3,
}
"""Shares of the turns at first."""

LATER_SHARES: dict[Task, float] = {
    **SHARES,
    arithmetic.addition: 6.0,
    arithmetic.subtraction: 6.0,
    arithmetic.multiplication: 2.5,
    arithmetic.division: 5.0,
    arithmetic.parity: 0.5,
    arithmetic.word_problem: 3.0,
    measures.conversion: 3.0,
    measures.weekday: 2.5,
    measures.next_date: 3.0,
    lists.sort_words: 2.5,
    lists.extreme: 0.5,
    lists.count_words: 2.5,
    lists.place: 1.2,
    lists.reverse: 2.0,
    facts.fact: 5.0,
    stories.story: 1.5,
}
"""Shares from step `TrainingRecipe.later_from` on: facts are known by then, and what is worked out step by step is shown more."""

LAST_SHARES: dict[Task, float] = {
    **LATER_SHARES,
    arithmetic.division: 9.0,
    arithmetic.comparison: 3.0,
    measures.month: 4.0,
    lists.sort_words: 4.0,
}
"""Shares from step `TrainingRecipe.last_from` on: what was still below the rest."""

PARTS = (SHARES, LATER_SHARES, LAST_SHARES)
