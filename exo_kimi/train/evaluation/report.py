"""The result of an evaluation, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from exo_kimi.compress.compare.score import Score
from exo_kimi.train.evaluation.likelihood import Likelihood


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One checkpoint's evaluation. `wrong` holds question, right answer and the model's answer."""

    directory: str
    against: str | None
    tasks: dict[str, Score]
    calls_valid: Score
    calls_right: Score
    results_used: Score
    think_closed: Score
    likelihood: Likelihood
    wrong: list[tuple[str, str, str]]

    @property
    def balance(self) -> dict[int, tuple[float, float]]:
        """Layer -> lowest and highest load of an expert, as multiples of the even share."""
        return {
            layer: (min(loads) * len(loads) / sum(loads), max(loads) * len(loads) / sum(loads))
            for layer, loads in self.likelihood.loads.items()
        }

    def to_text(self, wrong: int = 0) -> str:
        """A table for people, with some of the wrong answers."""
        shown = [f"  asked {asked!r}: {right!r}, not {said!r}" for asked, right, said in self.wrong[:wrong]]
        return "\n".join([*self._lines(), *shown])

    def _lines(self) -> Iterator[str]:
        yield f"{self.directory}: greedy answers to questions that no training text holds (95 % intervals)"
        rows = {
            **dict(sorted(self.tasks.items())),
            "all questions": self.overall,
            "tool calls valid": self.calls_valid,
            "tool calls right": self.calls_right,
            "tool results used": self.results_used,
            "think tags closed": self.think_closed,
        }
        for name, row in rows.items():
            low, high = row.interval
            yield f"  {name:<20} {100 * row.share:6.1f} %   {row.right}/{row.count}   {100 * low:.1f} to {100 * high:.1f}"
        yield f"  perplexity of held-out answers {self.likelihood.perplexity:.4f}"
        if self.likelihood.kl is not None and self.likelihood.same_choice is not None:
            same = self.likelihood.same_choice
            yield f"  against {self.against}: KL {self.likelihood.kl.describe(6)} nats a token (95 % intervals)"
            yield f"    same choice {100 * same.value:.2f} % ({100 * same.low:.2f} to {100 * same.high:.2f})"
        for layer, (low, high) in self.balance.items():
            yield f"  layer {layer}: an expert gets {low:.2f} to {high:.2f} times the even share"

    @property
    def overall(self) -> Score:
        """All questions together."""
        tasks = self.tasks.values()
        return Score(right=sum(task.right for task in tasks), count=sum(task.count for task in tasks))

    def to_json(self) -> str:
        """One line."""
        scores = {
            **self.tasks,
            "calls_valid": self.calls_valid,
            "calls_right": self.calls_right,
            "results_used": self.results_used,
            "think_closed": self.think_closed,
        }
        kl, same = self.likelihood.kl, self.likelihood.same_choice
        return json.dumps(
            {
                "directory": self.directory,
                "against": self.against,
                "scores": {name: [value.right, value.count] for name, value in scores.items()},
                "perplexity": self.likelihood.perplexity,
                "kl": None if kl is None else kl.value,
                "kl_interval": None if kl is None else [kl.low, kl.high],
                "same_choice": None if same is None else same.value,
                "loads": self.likelihood.loads,
            }
        )
