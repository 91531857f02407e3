"""The answers that are being made, by the names under which a client can cancel them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.problems import ApiProblem


class RunningAnswers:
    """What `POST /v1/cancel/{id}` can end. Used from the event loop only."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[Generation]] = {}

    @contextmanager
    def listed(self, generation: Generation, names: Iterable[str]) -> Iterator[None]:
        """The generation can be cancelled under these names inside the context."""
        kept = set(filter(None, names))
        for name in kept:
            self._by_name.setdefault(name, []).append(generation)
        try:
            yield
        finally:
            for name in kept:
                self._by_name[name].remove(generation)
                if not self._by_name[name]:
                    del self._by_name[name]

    def cancel(self, name: str) -> bool:
        """End the answers of this name on every stage; whoever waits for one reads why. False: there is none."""
        found = self._by_name.get(name, ())
        for generation in found:
            generation.fail(ApiProblem(409, f"the answer was cancelled by POST /v1/cancel/{name}", code="cancelled"))
        return bool(found)
