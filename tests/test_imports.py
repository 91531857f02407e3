"""Imports point down only, as docs/architecture.md draws it, and importing changes nothing."""

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
    "units": 1,
    "sse": 1,
    "logs": 1,
    "arch": 2,
    "checkpoint": 3,
    "experts": 4,
    "planner": 5,
    "models": 5,
    "chat": 5,
    "pictures": 5,
    "runtime": 6,
    "dialogue": 7,
    "page": 7,
    "fetch": 7,
    "pairing": 7,
    "serve": 8,
    "plugin": 8,
    "compress": 8,
    "train": 9,
    "client": 9,
    "owner": 10,
    "bench": 10,
    "cli": 11,
    "exo": 11,
    "__main__": 12,
}
# Inside runtime: the contracts (its own modules) at the bottom; engine, cluster and stage meet in them and in what is below.
RUNTIME_FLOORS = {
    "requests": 0,
    "reserve": 0,
    "end_signals": 1,
    "threads": 0,
    "descriptors": 0,
    "prefix_key": 1,
    "token_mask": 0,
    "steps": 1,
    "pipeline": 2,
    "transport": 3,
    "protocol": 4,
    "pairs": 5,
    "loading": 5,
    "engine": 6,
    "cluster": 6,
    "stage": 6,
}
LARGEST_FOLDER = 20
WITHOUT_MLX = ("errors", "units", "arch", "checkpoint", "experts", "planner", "chat", "pictures", "page")
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
        if _floor(imported) >= _floor(importer) and _room(imported) != _room(importer)
    ]
    assert wrong == []


def test_engine_cluster_and_stage_never_import_each_other() -> None:
    """They meet in requests, steps, pipeline and the protocol."""
    wrong = [
        f"{importer} -> {imported}"
        for importer, imported in _arrows()
        if importer.startswith("exo_kimi.runtime.") and imported.startswith("exo_kimi.runtime.")
        for above, below in [(importer.split(".")[2], imported.split(".")[2])]
        if above != below and RUNTIME_FLOORS[below] >= RUNTIME_FLOORS[above]
    ]
    assert wrong == []


def test_no_folder_is_crowded() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    sizes = {str(folder.relative_to(PACKAGE.parent)): len(list(folder.glob("*.py"))) - 1 for folder in folders}
    assert {folder: size for folder, size in sizes.items() if size > LARGEST_FOLDER} == {}


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


def _floor(module: str) -> int:
    return FLOORS[_room(module)]


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
