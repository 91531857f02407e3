"""mlx-lm's `models` without the rest of mlx-lm, for processes that need nothing else of it."""

from __future__ import annotations

import importlib.util
import sys


def skip_mlx_lm_init() -> None:
    """Have imports of `mlx_lm.models` in this process run no `mlx_lm/__init__.py`; does nothing where it has run.

    That file imports all of mlx-lm with transformers and huggingface_hub, and torch where it is installed: 1 to 3 s of each
    start of a stage, in which nothing is served. What it defines (`mlx_lm.load`) is missing then.
    """
    spec = importlib.util.find_spec("mlx_lm") if "mlx_lm" not in sys.modules else None
    if spec is not None:
        sys.modules["mlx_lm"] = importlib.util.module_from_spec(spec)
