"""The vision tower of a checkpoint, loaded alone and run on noise: what `exo-kimi layer DIR vision` shows."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from exo_kimi.arch.vision import CHANNELS, Grid
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.vision import NoVision, find_vision
from exo_kimi.errors import NotACheckpointError
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.runtime.loading.loader import check_dtype
from exo_kimi.runtime.loading.vision import load_tower
from exo_kimi.units import format_bytes, format_seconds

SIZE = (640, 480)
"""Width and height in pixels of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerReport:
    """What a tower is and how it ran. `first_s` is the run that also compiles and touches the weights for the first time."""

    parameters: int
    tensors: int
    blocks: int
    device: str
    dtype: str
    disk_bytes: int
    resident_bytes: int
    peak_bytes: int
    load_s: float
    size: tuple[int, int]
    grid: Grid
    output_shape: tuple[int, ...]
    first_s: float
    run_s: float
    output_is_finite: bool

    def to_text(self) -> str:
        """The report as `exo-kimi layer` prints it."""
        width, height = self.size
        tokens, hidden = self.output_shape
        return "\n".join(
            [
                f"vision tower and projector ({self.blocks} blocks, {self.parameters / 1e6:.1f} M parameters in "
                f"{self.tensors} tensors), {self.dtype}, on {self.device}",
                f"load     {format_bytes(self.disk_bytes)} read in {format_seconds(self.load_s)}, "
                f"{format_bytes(self.resident_bytes)} resident",
                f"picture  {width} x {height} pixels -> {self.grid.rows} x {self.grid.columns} patches -> {tokens} tokens "
                f"of {hidden} in {format_seconds(self.run_s)} (first run {format_seconds(self.first_s)})",
                f"memory   {format_bytes(self.peak_bytes)} at peak",
                f"output   {'finite' if self.output_is_finite else 'NOT FINITE: this tower would break every answer'}",
            ]
        )


def run_tower(path: str | Path, *, dtype: str | None = None) -> TowerReport:
    """Load the tower and nothing else, and run a picture of noise through it, twice.

    Args:
        path: a checkpoint directory.
        dtype: of the weights and activations; None keeps what is stored.

    Raises:
        NotACheckpointError: there is no tower.
        CheckpointError: the tower is not whole.
        UsageError: an unknown dtype.
    """
    check_dtype(dtype)
    found = find_vision(open_index(Path(path)))
    if isinstance(found, NoVision):
        raise NotACheckpointError(f"no vision tower: {found.reason}", where=path)
    gc.collect()  # what the collector frees while this loads would count as less
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    model = load_tower(found, dtype=dtype)
    load_s = time.perf_counter() - start
    resident_bytes = mx.get_active_memory() - before_bytes
    rules = PixelRules.from_directory(found.config, path)
    grid = rules.grid(*rules.size(*SIZE))
    patch = found.config.patch_size
    pixels = mx.random.randint(0, 256, (1, grid.rows * patch, grid.columns * patch, CHANNELS)).astype(mx.uint8)
    mx.eval(pixels)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        vectors = model(pixels, grid)
        seconds.append(time.perf_counter() - start)
    return TowerReport(
        parameters=found.config.parameters,
        tensors=len(found.entries),
        blocks=found.config.vt_num_hidden_layers,
        device=str(mx.default_device()).removeprefix("Device(").partition(",")[0],
        dtype=str(model.dtype).rpartition(".")[2],
        disk_bytes=found.resident_bytes,
        resident_bytes=resident_bytes,
        peak_bytes=mx.get_peak_memory() - before_bytes,
        load_s=load_s,
        size=SIZE,
        grid=grid,
        output_shape=tuple(vectors.shape),
        first_s=seconds[0],
        run_s=seconds[1],
        output_is_finite=bool(mx.isfinite(vectors).all()),
    )
