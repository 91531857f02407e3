"""The stable door `exo_kimi.exo`: its names and parameters stay, opening it is light, and the patches use no other."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import exo_kimi.exo
from exo_kimi.plugin.runner import launch

ROOT = Path(__file__).parents[2]
DOOR = {
    "begin_legacy": "()",
    "entrypoint": "(bound_instance, event_sender, task_receiver, cancel_receiver, _logger)",
    "install": "(say)",
}
HEAVY = ("mlx", "mlx_lm", "zmq", "tiktoken", "llguidance", "jinja2", "numpy", "exo")


def test_the_names_and_their_parameters_do_not_change() -> None:
    """People's own exo and the patches that they applied call them; a name that goes breaks an installation."""
    found = {
        name: f"({', '.join(inspect.signature(getattr(exo_kimi.exo, name)).parameters)})"
        for name in exo_kimi.exo.__all__
    }
    assert found == DOOR
    assert inspect.signature(exo_kimi.exo.install).parameters["say"].default is print


def test_importing_the_door_is_light() -> None:
    code = f"import sys, exo_kimi.exo; print([n for n in {HEAVY!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_the_patches_go_through_the_door_only() -> None:
    added = [
        line[1:].strip()
        for path in (ROOT / "patches").rglob("*.patch")
        for line in path.read_text().splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    imports = [line for line in added if re.search(r"\bimport\b.*|\bfrom exo_kimi\b", line) and "exo_kimi" in line]
    assert len(imports) == 3
    for line in imports:
        match = re.fullmatch(r"from exo_kimi\.exo import (\w+)( as \w+)?", line)
        assert match is not None and match[1] in DOOR, line


@pytest.mark.parametrize("entrypoint", [exo_kimi.exo.entrypoint, launch.entrypoint], ids=["door", "bound"])
def test_a_spawned_process_finds_the_entrypoint_by_its_name(entrypoint: object) -> None:
    """exo spawns runners: what is bound travels as a name, and the child imports neither MLX nor exo to find it."""
    code = (
        "import pickle, sys; found = pickle.loads(bytes.fromhex(sys.argv[1]));"
        f"print(found.__module__, found.__name__, [n for n in {('mlx', 'exo')!r} if n in sys.modules])"
    )
    told = pickle.dumps(entrypoint).hex()
    run = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split(maxsplit=2) == [entrypoint.__module__, "entrypoint", "[]\n"]
