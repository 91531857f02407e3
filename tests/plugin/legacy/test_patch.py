"""The patch for bare legacy exo: our lines only, and with it exo itself answers as by plan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PATCHES = sorted((Path(__file__).parents[3] / "patches" / "exo-v0.0.15-alpha").glob("*.patch"))
PROMPT = "Tell me about the sea."


def test_there_is_a_patch() -> None:
    assert [path.name for path in PATCHES] == ["exo-kimi.patch"]


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name)
def test_it_says_what_and_why_and_holds_our_lines_only(path: Path) -> None:
    text = path.read_text()
    header, start, diff = text.partition("--- a/")
    assert start and "What:" in header and "Why:" in header and "git apply --unidiff-zero" in header
    lines = [start + diff.splitlines()[0], *diff.splitlines()[1:]]
    hunk = re.compile(r"@@ -\d+,0 \+\d+(,\d+)? @@")
    for line in lines:
        assert line.startswith(("--- a/exo/", "+++ b/exo/")) or hunk.fullmatch(line) or line[:1] == "+", line
    counts = [int(match[1]) for match in re.finditer(r"@@ -\d+,0 \+\d+,(\d+) @@", diff)]
    assert sum(counts) == sum(line.startswith("+") and not line.startswith("+++") for line in lines)


@pytest.mark.exo
@pytest.mark.timeout(300)
class TestOnRealExo:
    @pytest.fixture
    def source(self, real_legacy: Any, tmp_path: Path) -> Path:
        """A patched copy of the checkout."""
        if reason := real_legacy.missing():
            pytest.skip(reason)
        copy = tmp_path / "exo"
        shutil.copytree(os.environ["EXO_LEGACY_SRC"], copy, ignore=shutil.ignore_patterns(".git"))
        for path in PATCHES:
            subprocess.run(["git", "apply", "--unidiff-zero", str(path)], cwd=copy, check=True, timeout=60)
        return copy

    def test_bare_exo_starts_with_our_plan_and_answers_as_one_process(
        self, real_legacy: Any, legacy_models: Any, legacy_plan: Path, tiny: Path, source: Path, tmp_path: Path
    ) -> None:
        bare = ["-c", "from exo.main import run; run()"]  # what its `exo` command does
        with real_legacy.cluster(tmp_path, source) as cluster:
            for number in (1, 2):
                told = {"EXO_KIMI_PLAN": str(legacy_plan), "EXO_KIMI_MODEL": str(tiny), "EXO_KIMI_PRELOAD": "1"}
                told["EXO_KIMI_API_HOST"] = f"{real_legacy.NETWORK}.{number}"
                cluster.start(number, bare, extra=told)
            cluster.wait_seen()
            held = lambda node: any("bytes resident (" in line for line in node.said())  # noqa: E731
            real_legacy.wait_until(lambda: all(map(held, cluster.nodes)), 60, cluster.tail)
            answer = cluster.ask(1, PROMPT, model="tiny")
            assert answer.status_code == 200, cluster.tail()
            (tokens,) = cluster.nodes[1].replies().values()
            assert tokens == legacy_models.kimi_reply(tiny, PROMPT, 16)

    def test_without_a_plan_it_is_exo_as_it_was(self, real_legacy: Any, source: Path, tmp_path: Path) -> None:
        look = "import exo.main; print('session', exo.main.exo_kimi_session, 'exo_kimi' in __import__('sys').modules)"
        with real_legacy.cluster(tmp_path, source) as cluster:
            node = cluster.start(1, ["-c", look], arguments=["--inference-engine", "dummy"], count=1)
            assert node.process.wait(90) == 0, cluster.tail()
            assert "session None False" in node.text()
