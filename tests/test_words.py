"""How the tree is written: a name means one thing, and a docstring says what a thing is, not what it does not know."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "exo_kimi"
DISCLAIMER = re.compile(
    r"knows? (nothing|neither|no |only|not )|knows? .{1,60}(nothing else|and no )|It (opens|knows) no", re.DOTALL
)


def test_no_docstring_says_what_a_file_does_not_know() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}: {found[0]}"
        for path in PACKAGE.rglob("*.py")
        if (found := DISCLAIMER.search(ast.get_docstring(ast.parse(path.read_text())) or ""))
    ]
    assert wrong == []


def test_every_module_has_a_docstring() -> None:
    wrong = [
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert wrong == []


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
