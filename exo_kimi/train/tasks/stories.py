"""Very short stories about what the user names."""

from __future__ import annotations

from random import Random

from exo_kimi.train.tasks.turn import Turn

_HEROES = "fox bear cat dog king queen child mouse bird wolf frog girl boy horse owl".split()
_PLACES = "river forest garden castle village mountain lake island field town".split()
_THINGS = "lamp key book ring stone map bell coin letter hat".split()
_STORIES = (
    "Once a {hero} lived near a {place}. One day the {hero} found a {thing}. The {hero} took the {thing} home and was happy.",
    "A {hero} went to the {place} to look for a {thing}. It was dark, but the {hero} was brave. In the end the {hero} found "
    "the {thing} and everybody was glad.",
    "There was a {hero} who had lost a {thing}. The {hero} looked for the {thing} in the {place} all day. At night the moon "
    "came out, and there was the {thing}.",
)


def story(rng: Random) -> Turn:
    """A story of three sentences; any of the plots is right."""
    parts = {"hero": rng.choice(_HEROES), "place": rng.choice(_PLACES), "thing": rng.choice(_THINGS)}
    told = [plot.format(**parts) for plot in _STORIES]
    phrases = (
        "Tell me a story about a {hero}, a {place} and a {thing}.",
        "Write a short story with a {hero}, a {place} and a {thing}.",
    )
    return Turn(
        task="stories",
        key="story {hero} {place} {thing}".format(**parts),
        question=rng.choice(phrases).format(**parts),
        answer=rng.choice(told),
        accepted=tuple(told),
    )
