"""One conversion, in a process of its own: how long it took, how much work, how much memory it came to.

`theirs` is `mlx_lm.convert` without its tokenizer, which it cannot load without the code of a checkpoint.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  imported before memory is looked at
import mlx.core as mx
import mlx_lm.models.deepseek_v3
import mlx_lm.utils
from mlx_lm.convert import convert as their_convert

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.run import convert
from exo_kimi.planner.weights.recipes import load_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedChild:
    """What one conversion took: seconds, seconds of all processors, and the most memory beside what was resident before."""

    seconds: float
    processor_s: float
    peak_bytes: int


def convert_once(side: str, source: Path, output: Path, bits: int) -> ConvertedChild:
    """Convert with uniform bits in groups of 64.

    Args:
        side: `search` or `mlx`, our ways to choose codes, or `theirs`.
        source: a bf16 checkpoint.
        output: a new directory.
        bits: of every module.
    """
    gc.collect()
    before = _resident_bytes()
    _reset_peak()
    began, work = time.perf_counter(), time.process_time()
    if side == "theirs":
        mlx_lm.utils.load_tokenizer = _no_tokenizer
        sys.modules["mlx_lm.convert"].__dict__["print"] = lambda *_: None
        their_convert(str(source), str(output), quantize=True, q_bits=bits, q_group_size=64)
        mx.synchronize()
    else:
        rounding: Any = side
        convert(make_conversion(Checkpoint(source), output, load_recipe(f"uniform-{bits}"), rounding=rounding))
    return ConvertedChild(
        seconds=time.perf_counter() - began,
        processor_s=time.process_time() - work,
        peak_bytes=_peak_bytes() - before,
    )


def _no_tokenizer(*_: Any, **__: Any) -> Any:
    return types.SimpleNamespace(save_pretrained=lambda *_: None)


def _resident_bytes() -> int:
    return _status("VmRSS") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak_bytes() -> int:
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
