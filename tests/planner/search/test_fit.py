"""The best quality that fits: the model as it is, then what was measured by its cost, then recipes by their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.cli import main
from exo_kimi.errors import PlanInfeasibleError, UsageError
from exo_kimi.planner.command import model_bytes, plan_answer
from exo_kimi.planner.weights.measured import bytes_to_json, pruned_bytes, read_report

MODEL, RECIPE = "kimi-k2.6", "int4"
FOUNDING = "m3-ultra-512, m2-ultra-192"
WHOLE = model_bytes(model=MODEL, recipe=RECIPE)


def _report(path: Path, keep: int, kl: float, *, closed: bool = False) -> Path:
    moe = [layer for layer, size in enumerate(WHOLE.expert_bytes) if size]
    model = pruned_bytes(WHOLE, dict.fromkeys(moe, keep))
    raw: dict[str, Any] = {
        "subject": f"k2.6, {keep} of 384 experts",
        "bytes": bytes_to_json(model),
        "overall": {"kl": {"value": kl, "low": kl / 2, "high": kl * 2}, "bound": False},
        "gates": [{"name": "loops", "passed": not closed, "text": ""}],
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def test_288_of_384_experts_are_three_quarters_of_their_bytes(tmp_path: Path) -> None:
    found = read_report(_report(tmp_path / "r", 288, 0.02), WHOLE)
    assert sum(found.model.expert_bytes) * 4 == sum(WHOLE.expert_bytes) * 3
    rest = WHOLE.total_bytes - sum(WHOLE.expert_bytes) - (found.model.total_bytes - sum(found.model.expert_bytes))
    assert rest == 60 * 96 * (2 * 7168 + 4)  # rows of the routers
    assert found.cost == "KL 0.0200 (0.0100 to 0.0400), gates open"


def test_what_fits_as_it_is_stays_as_it_is(tmp_path: Path) -> None:
    report = _report(tmp_path / "r", 288, 0.02)
    answer = plan_answer(model=MODEL, recipe=RECIPE, cluster="m3-ultra-512, m3-ultra-512", reports=[report], fit=True)
    assert answer.plan.model.name == WHOLE.name
    assert "as it is" in answer.text


def test_the_least_cost_that_fits_is_planned(tmp_path: Path) -> None:
    """Official INT4 does not fit 512 and 192 GB; 288 experts do, and cost less than 192; recipes that nobody measured wait."""
    reports = [_report(tmp_path / "192", 192, 0.2), _report(tmp_path / "288", 288, 0.02)]
    answer = plan_answer(model=MODEL, recipe=RECIPE, cluster=FOUNDING, context=8192, reports=reports, fit=True)
    assert answer.plan.model.name == "k2.6, 288 of 384 experts"
    lines = [line for line in answer.text.splitlines() if "GB " in line and "fit" in line]
    assert "as it is" in lines[0]
    assert "does not fit" in lines[0]
    assert ["288" in lines[1], "192" in lines[2]] == [True, True]
    assert "not measured" in lines[3]


def test_a_form_with_a_closed_gate_comes_last(tmp_path: Path) -> None:
    report = _report(tmp_path / "r", 288, 0.02, closed=True)
    answer = plan_answer(model=MODEL, recipe=RECIPE, cluster=FOUNDING, context=8192, reports=[report], fit=True)
    assert "288" not in answer.plan.model.name
    assert "1 gates CLOSED" in answer.considered[-1].cost
    sizes = [each.total_bytes for each in answer.considered if each.cost == "not measured"]
    assert sizes == sorted(sizes, reverse=True)


def test_the_explanation_offers_what_was_measured(tmp_path: Path) -> None:
    report = _report(tmp_path / "r", 288, 0.02)
    words = {"model": MODEL, "recipe": "q34+q6", "cluster": "m3-ultra-512, m2-ultra-192"}
    text = plan_answer(**words, explained=True, reports=[report]).text
    section = text[text.index("Smaller forms that were measured") :]
    assert "288 of 384 experts" in section
    assert "KL 0.0200" in section
    assert "Smaller forms" not in plan_answer(**words, explained=True).text


def test_where_nothing_fits_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanInfeasibleError, match="no form of"):
        plan_answer(model=MODEL, recipe=RECIPE, cluster="m2-ultra-192", fit=True)


@pytest.mark.parametrize("content", ["{}", "[]", "x", '{"bytes": null, "overall": {"kl": {}}, "gates": []}'])
def test_a_file_that_is_no_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="not a report"):
        read_report(tmp_path / "r", WHOLE)


def test_the_command_takes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _report(tmp_path / "r", 288, 0.02)
    words = ["plan", "--model", MODEL, "--recipe", RECIPE, "--cluster", FOUNDING, "--context", "8192"]
    assert main([*words, "--fit", "--report", str(report)]) == 0
    assert "Best quality that fits" in capsys.readouterr().out
    assert main([*words, "--fit", "--split", "61"]) != 0
    assert "--fit searches" in capsys.readouterr().err
