"""Every patch has a header and adds lines only, applies to its tag, and the exo that has it starts with our engine.

The second half runs where EXO_SRC (b5375f8ce) or EXO_71_SRC (v1.0.71) point at a checkout, as in runner/test_real_exo.py and
runner/test_real_exo_71.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines

PATCHES = Path(__file__).parents[2] / "patches"
FILES = sorted(path for path in PATCHES.rglob("*") if path.is_file())
CURRENT = {"exo-b5375f8ce": "exo b5375f8ce", "exo-v1.0.71": "exo v1.0.71"}
MODEL = "lab/kimi-k2-tiny"
OF_A_DIFF = re.compile(r"\+|diff --git |index |new file mode |--- |@@ -\d+,0 \+\d+(,\d+)? @@")


def test_there_is_a_folder_for_each_tag() -> None:
    assert set(CURRENT) <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_patch_says_what_it_is_and_adds_lines_only(path: Path) -> None:
    lines = path.read_text().splitlines()
    begins = next(number for number, line in enumerate(lines) if line.startswith(("diff --git ", "--- a/")))
    header, lines = "\n".join(lines[:begins]), lines[begins:]
    assert all(word in header for word in ("exo", "git apply --unidiff-zero", "What:", "Why:"))
    assert [line for line in lines if not OF_A_DIFF.match(line)] == []
    assert any(line.startswith("+") and not line.startswith("+++ ") for line in lines)


@pytest.fixture
def patched(exo_head: Any, exo_71: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A copy of a tag's exo with its patch."""

    def make(tag: str) -> Any:
        exo = exo_71 if tag == "exo-v1.0.71" else exo_head
        if isinstance(exo, str):
            pytest.skip(exo)
        if reason := exo.cannot_import_us():
            pytest.skip(reason)
        copy = tmp_path / "exo"
        copy.mkdir()
        for part in exo.source.iterdir():
            if part.name == "src":
                shutil.copytree(part, copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (copy / part.name).symlink_to(part)
        command = ["git", "apply", "--unidiff-zero", str(PATCHES / tag / "engine.patch")]
        subprocess.run([*command, "--check"], cwd=copy, check=True)
        subprocess.run(command, cwd=copy, check=True)
        return replace(exo, source=copy)

    return make


@pytest.mark.exo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tag", CURRENT)
def test_a_patched_exo_runs_a_kimi_on_our_engine(
    tag: str, patched: Callable[[str], Any], real_exo: Any, tiny: Path, tmp_path: Path
) -> None:
    exo = patched(tag)
    prepare(tiny, tmp_path / "models", model_id=MODEL)
    with real_exo.exo_cluster(exo, tmp_path / "with-us", tmp_path / "models", nodes=1) as cluster:
        log = cluster.nodes[0].log
        assert f"exo-kimi: Kimi models run on exo-kimi's engine ({CURRENT[tag]})" in log.read_text()
        with ExoClient(cluster.url) as client:
            plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=(7,), our_engine=True).plan
            apply_plan(client, plan, our_engine=True, deadlines=Deadlines(poll_s=0.3))
        assert f"exo-kimi runs {MODEL}" in log.read_text()


@pytest.mark.exo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tag", CURRENT)
def test_a_patched_exo_without_us_is_exo_as_it_is(
    tag: str, patched: Callable[[str], Any], real_exo: Any, tmp_path: Path
) -> None:
    exo = patched(tag)
    (tmp_path / "models").mkdir()
    hidden = tmp_path / "hidden" / "exo_kimi"  # an exo-kimi in exo's own environment is not seen either
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text('raise ImportError("hidden by a test")\n')
    paths = [hidden.parent, exo.standin, exo.source / "src", *(path for path in exo.paths if path.name == "standin71")]
    extra = {"PYTHONPATH": ":".join(map(str, paths))}
    with real_exo.exo_cluster(exo, tmp_path / "alone", tmp_path / "models", nodes=1, extra=extra) as cluster:
        log = cluster.nodes[0].log.read_text()
        assert "exo-kimi is not installed here, exo runs as it is: hidden by a test" in log
        assert httpx.get(f"{cluster.url}/models", timeout=30, trust_env=False).status_code == 200
