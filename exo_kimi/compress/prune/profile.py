"""How much may be pruned on which evidence: a quarter freely, half for one domain behind gates, more only for research."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.prune.prune import DEFAULT_SHARE, LEAST_SHARE
from exo_kimi.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyGate:
    """One condition on replies: loops, think tags, tool calls. `text` has the figures."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneVerdict:
    """What a report of `exo-kimi compare --json` says of a plan.

    Args:
        plan: hash of the plan; empty where two checkpoints were compared.
        gates: those that could be judged.
        notes: the cost, in sentences for the card.
    """

    plan: str
    gates: tuple[ReplyGate, ...]
    notes: tuple[str, ...]


def read_verdict(path: Path) -> PruneVerdict:
    """Read a report.

    Raises:
        UsageError: it is not one.
    """
    try:
        raw: Any = read_json(path)
        return verdict_of(raw)
    except OSError as error:
        raise UsageError("the report cannot be read", found=error.strerror, where=path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "not a report",
            expected="what `exo-kimi compare DIR --plan PLAN.json --json FILE` writes",
            found=f"{type(error).__name__}: {error}",
            where=path,
        ) from None


def verdict_of(raw: Mapping[str, Any]) -> PruneVerdict:
    """The same from a parsed report.

    Raises:
        KeyError, TypeError: it is not one.
    """
    gates = tuple(
        ReplyGate(name=str(gate["name"]), passed=gate["passed"] is True, text=str(gate["text"]))
        for gate in raw["gates"]
    )
    return PruneVerdict(plan=str(raw["plan"]), gates=gates, notes=tuple(map(str, raw["notes"])))


def check_profile(plan: PrunePlan, *, research: bool, domain: str, verdict: PruneVerdict | None) -> None:
    """Refuse to write what nothing speaks for.

    Args:
        plan: what stays.
        research: whether the user takes it as an experiment.
        domain: what the checkpoint is for, in the user's words; else what its calibration was about.
        verdict: a report on this plan.

    Raises:
        UsageError: what is missing, or which gate is closed.
    """
    if verdict is not None and verdict.plan != plan.hash:
        raise UsageError(
            "the report is on another plan",
            expected=plan.hash[:24],
            found=verdict.plan[:24] or "none",
            where="--report",
        )
    if research or plan.changes_nothing:
        return
    share = plan.share
    if plan.dropped_layers or share < LEAST_SHARE:
        what = "layers" if plan.dropped_layers else f"{1 - share:.0%} of the experts"
        raise UsageError(
            f"taking out {what} is an experiment, not a model to use",
            expected=f"all layers, and {LEAST_SHARE:.0%} of the experts or more",
            fix="keep more; or give --research, and measure it with `exo-kimi compare`",
        )
    if share >= DEFAULT_SHARE:
        return
    if not domain or domain == "general":
        raise UsageError(
            f"{share:.0%} of the experts do for one domain, not for all",
            expected='--domain, such as "code and tools", and scores from texts of it',
            fix=f"name it, or keep {DEFAULT_SHARE:.0%}",
        )
    if verdict is None:
        raise UsageError(
            f"{share:.0%} of the experts need a report on loops, think tags and tool calls first",
            expected="--report REPORT.json",
            fix="`exo-kimi prune DIR --keep N ... -o PLAN.json`, then `exo-kimi compare DIR --plan PLAN.json --json REPORT.json`",
        )
    closed = [gate for gate in verdict.gates if not gate.passed]
    if closed or not verdict.gates:
        raise UsageError(
            "the report speaks against this plan",
            found="; ".join(f"{gate.name}: {gate.text}" for gate in closed) or "no gate could be judged",
            where="--report",
            fix="keep more, calibrate on more texts of the domain, or give --research",
        )
