"""The exception tree is the one that the docstring of `exo_kimi.errors` draws."""

from __future__ import annotations

import re

from exo_kimi import errors


def test_the_drawn_tree_is_the_class_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    above = ["Exception"]
    for line in errors.__doc__.splitlines():
        found = re.match(r"((?:[| ] {3})*(?:\+-- )?)(\w+) {2,}\S", line)
        if found is not None:
            depth = len(found[1]) // 4
            above[depth + 1 :] = [found[2]]
            drawn[found[2]] = above[depth]
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    actual = {name: kind.__bases__[0].__name__ for name, kind in classes.items() if issubclass(kind, Exception)}
    assert drawn == actual


def test_every_class_says_when_it_is_raised() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all((kind.__doc__ or "").startswith(("Raised ", "Base class")) for kind in kinds)
