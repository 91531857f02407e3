"""On the shipped tiny Kimi, leave-one-out costs less than chance at 12 and 8 of 16 experts, and less than weight norms at 8.

A look that a suite can afford, by the bench that makes the table of docs/prune.md from more texts, chances and questions: there,
over 60 texts, it is a fifth of weight norm's, which 12 texts are too few to hold to a half.
"""

from __future__ import annotations

import pytest

from exo_kimi.bench.claims.prune import measure as prune
from exo_kimi.bench.claims.prune.measure import PruneSizes
from exo_kimi.compress.calibrate.scores import Criterion
from exo_kimi.train.evaluation.cases import question_cases


@pytest.mark.timeout(600)  # ten passes over texts
def test_leave_one_out_costs_less_than_chance_and_weight_norms() -> None:
    criteria: tuple[Criterion, ...] = ("leave-one-out", "weight-norm")
    sizes = PruneSizes(texts=30, held_out=12, seeds=2, questions=0, criteria=criteria, budgeted=False)
    result = prune.measure(sizes)
    rows = {row.name: row for row in result.rows}
    bars = [rows[name] for name in ("leave-one-out, 12 of 16", "leave-one-out, 8 of 16")]
    assert [row.bar for row in bars] == [1.0, 1.0]
    assert all(row.ok for row in bars), result.table()
    over_norm = rows["leave-one-out over weight-norm, 8 of 16"]
    assert over_norm.bar == 0.5 and over_norm.ratio < 0.75, result.table()
    assert {name.split(",")[0] for name in rows} >= {*criteria, "random x2"}


def test_replies_are_judged_beside_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself answers; a plan of chance, of which half of the experts are gone, does not answer all."""
    monkeypatch.setattr(prune, "question_cases", lambda count, seed: question_cases(count, seed)[4:10])
    sizes = PruneSizes(
        texts=4, held_out=4, seeds=1, questions=1, criteria=("leave-one-out",), keep=(8,), budgeted=False
    )
    result = prune.measure(sizes)
    assert result.notes[-1].startswith("the whole model: 6 of 6 questions right (61% to 100%)")
    chance = next(row for row in result.rows if row.name.startswith("random"))
    assert " of 6 questions right" in chance.note and "; 6 of 6" not in chance.note
