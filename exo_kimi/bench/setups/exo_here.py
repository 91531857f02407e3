"""Which exo can be started here, by variables of the environment; it starts nothing.

exo is a checkout that EXO_SRC names, run by the Python that EXO_PYTHON names, which has exo's packages and, for our engine, ours
(or EXO_PYTHONPATH names a folder of them). The stand-in for its Rust networking lies in `tests/plugin/standin`, or in the folder
that EXO_STANDIN names: `exo_rs.py` over eclipse-zenoh, and `exo_node.py`, which starts a node as the machine NODE_IP.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
STANDIN = REPOSITORY / "tests" / "plugin" / "standin"
ZENOH_PORT, DISCOVERY_PORT = 52414, 52413
_ZENOH = ("--namespace", "lab", "--zenoh-port", str(ZENOH_PORT), "--discovery-port", str(DISCOVERY_PORT))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoHere:
    """An exo that can be started.

    Args:
        source: the checkout.
        python: with exo's packages.
        standin: folder of the stand-in.
        paths: more folders to import from.
        arguments: of every node, beside those that all versions know.
    """

    source: Path
    python: Path
    standin: Path
    paths: Sequence[Path] = ()
    arguments: Sequence[str] = _ZENOH

    def cannot_import_us(self) -> str | None:
        """Why our engine cannot run in this Python; None when it can."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(map(str, [REPOSITORY, *self.paths]))}
        command = [str(self.python), "-c", "import zmq, llguidance, exo_kimi.plugin.runner.builder"]
        tried = subprocess.run(command, env=environment, capture_output=True, text=True)
        return None if tried.returncode == 0 else f"EXO_PYTHON cannot run exo-kimi: {tried.stderr.splitlines()[-1]}"

    def version_of(self, package: str) -> str:
        """What is installed in its Python."""
        command = [
            str(self.python),
            "-c",
            "import sys; from importlib.metadata import version as v; print(v(sys.argv[1]))",
        ]
        return subprocess.run([*command, package], capture_output=True, text=True, check=True).stdout.strip()


def find_exo(source: str = "EXO_SRC", python: str = "EXO_PYTHON") -> ExoHere | str:
    """The exo that variables of the environment name, or why there is none.

    Args:
        source: names the variable of the checkout.
        python: names the variable of its Python.
    """
    checkout, interpreter = os.environ.get(source), os.environ.get(python)
    if not checkout:
        return f"{source} does not name a checkout of exo"
    if not (Path(checkout) / "src" / "exo" / "main.py").exists():
        return f"{source}={checkout} is no checkout of exo"
    if not interpreter or not Path(interpreter).exists():
        return f"{python} does not name a Python 3.13 with exo's packages"
    standin = Path(os.environ.get("EXO_STANDIN") or STANDIN).resolve()
    if not (standin / "exo_node.py").exists():
        return f"EXO_STANDIN does not name a stand-in for exo's Rust module, and there is none in {standin}"
    extra = [Path(path) for path in os.environ.get("EXO_PYTHONPATH", "").split(":") if path]
    return ExoHere(source=Path(checkout).resolve(), python=Path(interpreter), standin=standin, paths=extra)
