"""Imports point down only, as design.md draws it, and importing changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "exo_kimi"
FLOORS = {
    "errors": 0,
    "units": 0,
    "arch": 1,
    "checkpoint": 1,
    "planner": 2,
    "models": 2,
    "chat": 2,
    "runtime": 3,
    "serve": 4,
    "plugin": 4,
    "bench": 4,
    "train": 4,
    "cli": 5,
    "__main__": 6,
}
WITHOUT_MLX = ("errors", "units", "arch", "checkpoint", "planner", "chat")
HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "fastapi", "uvicorn", "zmq", "tiktoken", "llguidance", "exo")


def test_the_facade_imports_nothing_when_it_is_imported() -> None:
    """`exo_kimi/__init__.py` sits above every room, so what it shares it must import lazily."""
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    names = [name for node in top for name in _names(node)]
    assert not [name for name in names if name.startswith("exo_kimi") or name.split(".")[0] in HEAVY]


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    code = {room for room in rooms if (PACKAGE / room).is_dir() and list((PACKAGE / room).glob("**/*.py"))}
    code |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert code - set(FLOORS) == set()


def test_imports_point_down() -> None:
    wrong = [
        f"{importer} -> {imported}"
        for importer, imported in _arrows()
        if FLOORS[_room(imported)] > FLOORS[_room(importer)] or _sideways(_room(importer), _room(imported))
    ]
    assert wrong == []


def test_the_lower_rooms_never_import_mlx() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if _room(_module(path)) in WITHOUT_MLX
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
        if name.split(".")[0] in ("mlx", "mlx_lm", "torch", "transformers")
    ]
    assert wrong == []


def test_transformers_and_torch_are_for_tests_only() -> None:
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["exo_kimi", "exo_kimi.cli"])
def test_importing_is_light(module: str) -> None:
    """The command line answers --help, and another program can look at us, without loading a framework."""
    code = f"import sys, {module}; print([n for n in {HEAVY!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[]"


def _sideways(importer: str, imported: str) -> bool:
    """arch may not see checkpoint; the rooms of floor 2, and those of floor 4, do not see each other."""
    if importer == imported:
        return False
    if (importer, imported) == ("arch", "checkpoint"):
        return True
    return FLOORS[importer] == FLOORS[imported] and FLOORS[importer] >= 2 and importer != "bench"


def _arrows() -> Iterator[tuple[str, str]]:
    for path in PACKAGE.rglob("*.py"):
        importer = _module(path)
        if importer == "exo_kimi":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _names(node):
                if name.startswith("exo_kimi."):
                    yield importer, name


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module] if node.module != "exo_kimi" else [f"exo_kimi.{alias.name}" for alias in node.names]
    return []


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"
