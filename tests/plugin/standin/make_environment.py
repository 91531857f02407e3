"""Makes the Python with which `pytest -m exo` runs exo: its packages, ours, and no compiler.

    python3.13 tests/plugin/standin/make_environment.py EXO VENV                    # exo b5375f8ce and v1.0.71
    python3.12 tests/plugin/standin/make_environment.py EXO_LEGACY VENV             # exo v0.0.15-alpha

exo's fork of mlx-lm comes from its public repository, or from a folder that `--mlx-lm` names. exo-kimi itself is imported from
this clone; what it needs is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MLX_LM = "git+https://github.com/rltakashige/mlx-lm@6a3df6cd"
# As exo b5375f8ce locks them, without what its tests on Linux and its runners of text models do not import: torch, mflux.
CURRENT = """
    pydantic==2.12.5 fastapi==0.128.0 transformers==5.6.2 rustworkx==0.17.1 anyio==4.11.0 hypercorn loguru aiohttp aiofiles httpx
    tomlkit msgspec zstandard python-daemon openai-harmony psutil huggingface-hub==1.8.0 pillow requests tqdm python-multipart
    mlx[cpu]==0.32.0 eclipse-zenoh>=1.10,<1.11 pytest>=8.4 pytest-asyncio>=1.0
""".split()
# Not exo's own requirements: they pin an mlx that is gone.
LEGACY = """
    aiohttp==3.10.11 aiohttp_cors==0.7.0 aiofiles==24.1.0 grpcio>=1.71,<1.72 protobuf>=5.28,<6 nvidia-ml-py opencv-python-headless
    pillow psutil requests scapy tqdm transformers>=5.6,<6 uvloop==0.21.0 tinygrad==0.10.2
""".split()
PYTHONS = {"EXO": (3, 13), "EXO_71": (3, 13), "EXO_LEGACY": (3, 12)}


def main(arguments: Sequence[str]) -> int:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exo", choices=PYTHONS)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--mlx-lm", default=MLX_LM, help=f"exo's fork (default {MLX_LM})")
    told = parser.parse_args(arguments)
    if sys.version_info[:2] != PYTHONS[told.exo]:
        parser.error(f"{told.exo} runs on Python {'.'.join(map(str, PYTHONS[told.exo]))}, and this is {sys.version}")
    venv.create(told.venv, with_pip=True)
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    if told.exo == "EXO_LEGACY":
        _install(told.venv, *LEGACY, *ours)
        return 0
    _install(told.venv, *CURRENT)
    _install(told.venv, "--no-deps", "mlx-vlm==0.4.4", told.mlx_lm)
    _install(told.venv, *(each for each in ours if not each.startswith("mlx")))
    _name_exo(told.venv)
    return 0


def _install(folder: Path, *packages: str) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)


def _name_exo(folder: Path) -> None:
    """exo asks for its own version by the name of its distribution."""
    library = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    made = library / "exo-1.0.0.dist-info"
    made.mkdir(exist_ok=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: exo\nVersion: 1.0.0\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
