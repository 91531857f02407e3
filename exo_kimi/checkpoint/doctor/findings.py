"""Findings of the doctor and the files that a repair would write, as data and as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exo_kimi.errors import ExoKimiError

Severity = Literal["error", "warning"]
MOST_LINES = 40
"""Lines of a report for a terminal, whatever the checkpoint has; `--json` has every finding."""
MOST_CHARACTERS = 12_000
MOST_WIDTH = 240
EXAMPLES = 3
_NUMBER = re.compile(r"\d[\d,]*")
_PROJECTION = re.compile(r"\b(?:gate|up|down)_proj\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Args:
        severity: `error`: the checkpoint cannot be served, or would answer wrongly. `warning`: exo-kimi is right in
            spite of it, other programs may not be.
        error: what, expected, found, where and fix, under its named class.
        fixable: whether `--fix` repairs it.
    """

    severity: Severity
    error: ExoKimiError
    fixable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A file as `--fix` would write it, and what changes in words."""

    file: str
    content: bytes
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A file that `--fix` wrote. `backup` is the copy of what was there, None where nothing was."""

    file: str
    backup: str | None
    changes: tuple[str, ...]


@dataclass(slots=True)
class Checkup:
    """Findings, remedies (by file) and notes on their way to a diagnosis."""

    findings: list[Finding] = field(default_factory=list)
    remedies: dict[str, Remedy] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def error(self, error: ExoKimiError, *, fixable: bool = False) -> None:
        """Note what keeps the checkpoint from being served."""
        self.findings.append(Finding(severity="error", error=error, fixable=fixable))

    def warn(self, error: ExoKimiError, *, fixable: bool = False) -> None:
        """Note what is wrong and does not hinder exo-kimi."""
        self.findings.append(Finding(severity="warning", error=error, fixable=fixable))

    def remedy(self, file: str, content: str, changes: Sequence[str]) -> None:
        """Note what `--fix` would write to a file."""
        data = content.encode("utf-8", "surrogatepass")
        self.remedies[file] = Remedy(file=file, content=data, changes=tuple(changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Result of an examination: everything that is wrong with a checkpoint directory.

    Args:
        directory: the directory.
        deep: whether weights were read.
        findings: errors first, each kind in the order it was met.
        notes: what is worth knowing and not wrong.
        changes: what a repair wrote before these findings were made.
    """

    directory: Path
    deep: bool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is no error; warnings may remain."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep the checkpoint from being served."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The other findings."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def to_json(self) -> str:
        """One JSON document; keys are only ever added."""
        return json.dumps(self._as_dict(), indent=2)

    def to_text(self) -> str:
        """For a terminal: what was changed, every finding, the count last."""
        blocks = [str(self.directory)]
        for change in self.changes:
            kept = f"; the old one is {change.backup}" if change.backup else ""
            blocks.append("\n".join([f"wrote    {change.file}{kept}", *(f"  {line}" for line in change.changes)]))
        for finding in self.findings:
            repair = "\n  repair    `exo-kimi doctor DIR --fix` does it" if finding.fixable else ""
            blocks.append(f"{finding.severity:<8} {type(finding.error).__name__}: {finding.error}{repair}")
        if self.notes:
            blocks.append("\n".join(f"note     {note}" for note in self.notes))
        blocks.append(self._verdict())
        # What a damaged file holds can be text that no terminal can print.
        text = "\n\n".join(blocks).encode("utf-8", "backslashreplace").decode()
        return text if text.count("\n") < MOST_LINES and len(text) < MOST_CHARACTERS else self._grouped_text()

    def _grouped_text(self) -> str:
        """At most MOST_LINES lines: findings that differ in numbers only are one, with a count and three examples."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            key = finding.severity, type(finding.error).__name__, _pattern(finding.error.what)
            groups.setdefault(key, []).append(finding)
        lines = [_line(str(self.directory))]
        lines += [_line(f"wrote    {change.file}") for change in self.changes[:3]]
        notes = [_line(f"note     {note}") for note in self.notes]
        if len(notes) > 3:
            notes = [*notes[:2], f"note     and {len(notes) - 2:,} notes more (--json)"]
        room = (
            MOST_LINES - len(lines) - len(notes) - 3
        )  # and the verdict, an empty line before it, and the rest by number
        pending = list(groups.values())
        # Whole findings first, as many as leave a line for every other group; then groups by one line each.
        while pending:
            block = _block(pending[0])
            if len(block) + min(len(pending) - 1, 5) > room:
                break
            lines += block
            room -= len(block)
            pending.pop(0)
        for group in pending[: max(room, 0)]:
            lines.append(_line(f"{group[0].severity:<8} {len(group):,} times: {group[0].error.what}"))
        left = sum(len(group) for group in pending[max(room, 0) :])
        if left:
            lines.append(f"... and {left:,} findings more (--json has all)")
        text = "\n".join([*lines, *notes, "", self._verdict()])
        return text.encode("utf-8", "backslashreplace").decode()

    def _verdict(self) -> str:
        looked = "weights were read" if self.deep else "headers only; --deep reads the weights too"
        if not self.findings:
            return f"healthy ({looked})"
        counts = [
            f"{len(found)} {name}{'' if len(found) == 1 else 's'}"
            for name, found in (("error", self.errors), ("warning", self.warnings))
            if found
        ]
        fixable = sum(finding.fixable for finding in self.findings)
        return f"{' and '.join(counts)} ({looked})" + (f"; --fix repairs {fixable}" if fixable else "")

    def _as_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "healthy": self.healthy,
            "deep": self.deep,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "findings": [
                {
                    "severity": finding.severity,
                    "kind": type(finding.error).__name__,
                    "what": finding.error.what,
                    "expected": finding.error.expected,
                    "found": finding.error.found,
                    "where": finding.error.where,
                    "fix": finding.error.fix,
                    "fixable": finding.fixable,
                }
                for finding in self.findings
            ],
            "notes": list(self.notes),
            "changes": [
                {"file": change.file, "backup": change.backup, "changes": list(change.changes)}
                for change in self.changes
            ],
        }


def _pattern(what: str) -> str:
    """What a finding is about, whatever layer, expert or projection it names."""
    return _PROJECTION.sub("*_proj", _NUMBER.sub("*", what))


def _block(group: list[Finding]) -> list[str]:
    """A group as lines: its first finding whole, and how many are like it with the next examples."""
    first = group[0]
    head, *details = f"{first.severity:<8} {type(first.error).__name__}: {first.error}".splitlines()
    lines = [_line(head), *(_line(detail) for detail in details)]
    if first.fixable:
        lines.append("  repair    `exo-kimi doctor DIR --fix` does it")
    if len(group) > 1:
        names = ", ".join(finding.error.what.partition(":")[0] for finding in group[1:EXAMPLES])
        lines.append(_line(f"  alike     {len(group) - 1:,} more, such as {names}"))
    return lines[:8]


def _line(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= MOST_WIDTH else f"{text[: MOST_WIDTH - 3]}..."
