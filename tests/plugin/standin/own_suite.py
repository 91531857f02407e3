"""exo's own tests, three times: exo as it is, with our patch, and with our names bound. The same must fail.

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python tests/plugin/standin/own_suite.py

EXO_PYTHON needs pytest and pytest-asyncio too. Arguments go to pytest, such as a folder of exo's
tests. Ends with 0 when the
ids that failed are the same, and at least one test passed, in all three.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PATCH = ROOT / "patches" / "exo-b5375f8ce" / "engine.patch"
BIND = """
from exo_kimi.plugin.node.placement import bind_planner
from exo_kimi.plugin.runner.launch import bind

assert bind() == (), bind()
assert bind_planner((), print) == ()
"""
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_PASSED = re.compile(r"(\d+) passed")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRun:
    """One run: ids that failed, and the last line of pytest."""

    failed: frozenset[str]
    passed: int
    summary: str


def main(arguments: Sequence[str]) -> int:
    """Run all three and say what differs."""
    arguments = arguments or ["src"]
    source, python = Path(os.environ["EXO_SRC"]).resolve(), os.environ["EXO_PYTHON"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        patched, hidden, bound = root / "patched", root / "hidden", root / "bound"
        shutil.copytree(source, patched, ignore=shutil.ignore_patterns(".git", "__pycache__", "node_modules", "target"))
        subprocess.run(["git", "apply", "--unidiff-zero", str(PATCH)], cwd=patched, check=True)
        (hidden / "exo_kimi").mkdir(parents=True)
        (hidden / "exo_kimi" / "__init__.py").write_text('raise ImportError("hidden")\n')
        bound.mkdir()
        (bound / "exo_kimi_bound.py").write_text(BIND)
        ways = {
            "plain": partial(_run, python, source, root, [hidden]),
            "patched": partial(_run, python, patched, root, [ROOT]),
            "bound": partial(_run, python, source, root, [bound, ROOT], options=["-p", "exo_kimi_bound"]),
        }
        runs = {name: run(arguments) for name, run in ways.items()}
        differ = runs["plain"].failed ^ runs["patched"].failed | runs["plain"].failed ^ runs["bound"].failed
        # Some of exo's tests wait for processes with short deadlines: what differs is run once more, alone.
        again = {name: run(sorted(differ)) for name, run in ways.items()} if differ else {}
    for name, each in runs.items():
        print(f"{name}: {each.summary}")
        print(f"  of what differed, alone: {again[name].summary}" if again else "", end="\n" if again else "")
    for name in sorted(runs["plain"].failed):
        print(f"fails in plain: {name}")
    different = False
    for name in ("patched", "bound") if again else ():
        for test in sorted(again["plain"].failed ^ again[name].failed):
            print(f"{'passes' if test in again['plain'].failed else 'fails'} only {name}: {test}")
            different = True
    return 1 if different or not all(each.passed for each in runs.values()) else 0


def _run(
    python: str,
    source: Path,
    root: Path,
    paths: Sequence[Path],
    arguments: Sequence[str],
    *,
    options: Sequence[str] = (),
) -> SuiteRun:
    home, dashboard = root / "home", root / "dashboard"
    home.mkdir(exist_ok=True)
    dashboard.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": ":".join(map(str, [*paths, HERE, source / "src"])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "EXO_TESTS": "1",
        "EXO_DASHBOARD_DIR": str(dashboard),
        "EXO_OFFLINE": "true",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    told = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    passed = _PASSED.search(told.stdout)
    summary = told.stdout.strip().splitlines()[-1] if told.stdout.strip() else told.stderr[-500:]
    return SuiteRun(
        failed=frozenset(_FAILED.findall(told.stdout)), passed=int(passed[1]) if passed else 0, summary=summary
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
