"""The result of a comparison: figures with their intervals, as text, JSON and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.compare.plots import histogram, interval_plot, line_plot
from exo_kimi.compress.compare.replies import Behaviour
from exo_kimi.compress.compare.score import Score
from exo_kimi.compress.compare.tokens import DistanceSummary
from exo_kimi.compress.compare.walks import LayerError
from exo_kimi.compress.compare.weights import WeightError
from exo_kimi.compress.prune.profile import ReplyGate
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.weights.measured import bytes_to_json

VERSION = 1
WORST = 12
"""Modules that the text names."""

_SCORES = {
    "without_loop": "replies without a loop",
    "closed": "think tags closed, reply ended",
    "called": "a tool called where needed",
    "calls_valid": "tool calls valid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """Two models, the second judged by the first.

    Args:
        reference, subject: their names.
        plan: hash of the pruning plan that was tried out on the first; empty for two models.
        overall: over all texts.
        by_domain: over those of each domain.
        kl: (M,) of each place, for the plot.
        layers: errors layer by layer; empty where they cannot be laid beside each other.
        weights: errors module by module; empty where they were not asked for.
        behaviours: how both replied; None where nobody was asked.
        gates: what the replies let through.
        model: bytes of the subject; None where neither side is a directory that says them.
        notes: what is to be known of how this was measured.
    """

    reference: str
    subject: str
    plan: str
    overall: DistanceSummary
    by_domain: dict[str, DistanceSummary]
    kl: NDArray[np.float64]
    layers: tuple[LayerError, ...] = ()
    weights: tuple[WeightError, ...] = ()
    behaviours: tuple[Behaviour, Behaviour] | None = None
    gates: tuple[ReplyGate, ...] = ()
    model: ModelBytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no gate is closed."""
        return all(gate.passed for gate in self.gates)

    def card_notes(self) -> tuple[str, ...]:
        """Sentences for the card of the second model."""
        found = self.overall
        bound = " at least" if found.bound else ""
        first = (
            f"KL{bound} {found.kl.describe()} nats a token over {found.texts} texts, {found.tokens} tokens; "
            f"the likeliest token is the same for {100 * found.same.value:.2f} %; perplexity {found.perplexity:.4g} "
            f"where the original has {found.reference_perplexity:.4g}"
        )
        domains = (f"{name}: KL {each.kl.describe()}" for name, each in self.by_domain.items())
        gates = (f"{'open' if gate.passed else 'CLOSED'}: {gate.name}: {gate.text}" for gate in self.gates)
        return (first, *domains, *gates, *self.notes)

    def to_text(self) -> str:
        """For a terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.subject} against {self.reference} (95 % intervals over texts)"
        bound = "at least " if self.overall.bound else ""
        for name, each in {"all texts": self.overall, **self.by_domain}.items():
            yield (
                f"  {name:<14} KL {bound}{each.kl.describe()}   same {100 * each.same.value:6.2f} % "
                f"({100 * each.same.low:.2f} to {100 * each.same.high:.2f})   perplexity {each.perplexity:.4g} / "
                f"{each.reference_perplexity:.4g}   {each.tokens} tokens"
            )
        yield f"  median KL {self.overall.kl_median:.2g}, 99 % under {self.overall.kl_99:.3g}"
        if self.layers:
            worst = max(self.layers, key=lambda layer: layer.mlp)
            yield f"  layers: the largest error of an MLP is {worst.mlp:.3f}, layer {worst.layer}"
        changed = [module for module in self.weights if module.error]
        if self.weights:
            yield f"  weights: {len(changed)} of {len(self.weights)} modules differ"
        for module in sorted(changed, key=lambda each: -each.error)[:WORST]:
            yield f"  {module.error:.4f}  {module.path}  {module.reference} -> {module.subject}"
        if self.behaviours is not None:
            yield f"  {'':<32} {'reference':>18} {'subject':>18}"
            for field, name in _SCORES.items():
                ours, theirs = (getattr(each, field) for each in self.behaviours)
                yield f"  {name:<32} {_score(ours):>18} {_score(theirs):>18}"
        for gate in self.gates:
            yield f"  gate {'open  ' if gate.passed else 'CLOSED'} {gate.name}: {gate.text}"
        yield from (f"  {note}" for note in self.notes)

    def to_json(self) -> str:
        """One JSON document; `exo-kimi prune --report` and `exo-kimi plan --explain` read it."""
        behaviours = None if self.behaviours is None else [asdict(each) for each in self.behaviours]
        return (
            json.dumps(
                {
                    "version": VERSION,
                    "reference": self.reference,
                    "subject": self.subject,
                    "plan": self.plan,
                    "bytes": None if self.model is None else bytes_to_json(self.model),
                    "overall": asdict(self.overall),
                    "by_domain": {name: asdict(each) for name, each in self.by_domain.items()},
                    "layers": [asdict(each) for each in self.layers],
                    "weights": [asdict(each) for each in self.weights],
                    "behaviours": behaviours,
                    "gates": [asdict(gate) for gate in self.gates],
                    "notes": list(self.card_notes()),
                },
                indent=1,
            )
            + "\n"
        )

    def to_html(self) -> str:
        """One self-contained page."""
        return _PAGE.format(title=escape(f"{self.subject} against {self.reference}"), body="\n".join(self._blocks()))

    def _blocks(self) -> Iterator[str]:
        bound = " (a lower bound)" if self.overall.bound else ""
        rows = {"all texts": self.overall, **self.by_domain}
        yield "<h2>Next tokens</h2>"
        yield _table(
            (
                "",
                f"KL, nats a token{bound}",
                "same likeliest token",
                "perplexity",
                "of the reference",
                "texts",
                "tokens",
            ),
            (
                (
                    name,
                    each.kl.describe(),
                    f"{100 * each.same.value:.2f} % ({100 * each.same.low:.2f} to {100 * each.same.high:.2f})",
                    f"{each.perplexity:.4g}",
                    f"{each.reference_perplexity:.4g}",
                    str(each.texts),
                    str(each.tokens),
                )
                for name, each in rows.items()
            ),
        )
        yield interval_plot([(name, each.kl) for name, each in rows.items()], unit="KL in nats a token, 95 % intervals")
        yield "<h3>Where the distance lies</h3>"
        yield histogram(self.kl, unit="KL of a place in nats; most of a mean comes from few places")
        if self.layers:
            yield "<h2>Layers</h2><p>Each layer of the second model on the first one's own hidden states.</p>"
            lines = [
                ("attention", [each.attention for each in self.layers]),
                ("MLP", [each.mlp for each in self.layers]),
            ]
            yield line_plot(lines, [each.layer for each in self.layers], unit="relative error by layer")
        if self.weights:
            yield "<h2>Weights</h2>"
            worst = sorted(self.weights, key=lambda each: -each.error)
            yield _table(
                ("module", "relative error", "reference", "subject"),
                ((each.path, f"{each.error:.5f}", each.reference, each.subject) for each in worst),
            )
        if self.behaviours is not None:
            yield "<h2>Replies</h2>"
            yield _table(
                ("", "reference", "subject"),
                (
                    (name, *(_score(getattr(each, field)) for each in self.behaviours))
                    for field, name in _SCORES.items()
                ),
            )
        if self.gates:
            yield "<h2>Gates</h2>"
            yield _table(
                ("", "", ""), ((gate.name, "open" if gate.passed else "CLOSED", gate.text) for gate in self.gates)
            )
        if self.notes:
            yield "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>"


def _score(score: Score) -> str:
    low, high = score.interval
    return f"{score.right}/{score.count} ({100 * low:.0f} to {100 * high:.0f} %)" if score.count else "none"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .75rem; border-bottom: 1px solid #d8dde5; text-align: left; font-weight: normal }}
th {{ color: #6b7280 }}
svg {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
