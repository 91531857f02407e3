"""A picture as the vision tower takes it, and the rules by which its size follows from the file's.

Source: `media_proc_cfg` in preprocessor_config.json of moonshotai/Kimi-K2.5, and the size rule of its processor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.arch.vision import CHANNELS, Grid, VisionConfig
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.errors import ConfigError

PREPROCESSOR_NAME = "preprocessor_config.json"
IN_PATCH_LIMIT = 16_384
PATCH_LIMIT_ON_ONE_SIDE = 512
_ONLY_VALUE: dict[str, object] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "fixed_output_tokens": None,
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Pixels ready for the tower.

    Args:
        grid: how many patches.
        pixels: (frames, rows * patch_size, columns * patch_size, 3) uint8, row-major.
        digest: names these pixels, this grid and the tower: equal digests, equal vectors. 32 hexadecimal digits.
    """

    grid: Grid
    pixels: bytes
    digest: str

    @classmethod
    def of(cls, grid: Grid, pixels: bytes, *, tower: str = "") -> Picture:
        """A picture under the name that its pixels give it, and the fingerprint of the tower that will see them."""
        shape = f"{tower} {grid.frames} {grid.rows} {grid.columns} ".lstrip().encode()
        return cls(grid, pixels, hashlib.sha256(shape + pixels).hexdigest()[:32])


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRules:
    """How large a picture becomes.

    Args:
        patch_size, merge_kernel_size: of the tower.
        in_patch_limit: most patches of a picture, before padding.
        patch_limit_on_one_side: most patches in a row or a column.
        tower: its fingerprint. Caches of prompts outlive a server, and the next one may have another tower.
    """

    patch_size: int
    merge_kernel_size: tuple[int, int]
    in_patch_limit: int = IN_PATCH_LIMIT
    patch_limit_on_one_side: int = PATCH_LIMIT_ON_ONE_SIDE
    tower: str = ""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, in pixels, to which a picture is scaled: down where it is over a limit, never up."""
        patch, side = self.patch_size, self.patch_limit_on_one_side * self.patch_size
        patches = max(1, width // patch) * max(1, height // patch)
        scale = min(1.0, math.sqrt(self.in_patch_limit / patches), side / width, side / height)
        return min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)

    def grid(self, width: int, height: int) -> Grid:
        """Patches of a picture that was scaled so: whole tokens, what is over is padding on the right and below."""
        down, across = self.merge_kernel_size
        rows = -(-height // (self.patch_size * down)) * down
        columns = -(-width // (self.patch_size * across)) * across
        return Grid(1, rows, columns)

    @property
    def most_pixel_bytes(self) -> int:
        """Bytes of the largest picture that can come out, roughly: a row and a column of padding are added."""
        return 2 * self.in_patch_limit * self.patch_size**2 * CHANNELS

    @classmethod
    def from_directory(cls, config: VisionConfig, directory: str | Path, *, tower: str = "") -> PixelRules:
        """The rules that a checkpoint states, or the published ones where it has no preprocessor_config.json.

        Args:
            config: of the tower.
            directory: of the checkpoint.
            tower: its fingerprint.

        Raises:
            ConfigError: the file cannot be read, contradicts config.json, or asks for what is not implemented.
        """
        path = Path(directory) / PREPROCESSOR_NAME
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raw = {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{PREPROCESSOR_NAME} cannot be read", found=error, where=path) from None
        stated = raw.get("media_proc_cfg", {}) if isinstance(raw, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ConfigError("media_proc_cfg is no object", expected="{...}", where=path)
        _check(stated, config, path)
        limits = {
            key: int(stated[key])
            for key in ("in_patch_limit", "patch_limit_on_one_side")
            if stated.get(key) is not None
        }
        return cls(patch_size=config.patch_size, merge_kernel_size=config.merge_kernel_size, tower=tower, **limits)


def _check(stated: Mapping[str, Any], config: VisionConfig, path: Path) -> None:
    height, width = config.merge_kernel_size
    expected: dict[str, object] = {**_ONLY_VALUE, "patch_size": config.patch_size}
    if height == width:
        expected["merge_kernel_size"] = height
    for key, value in expected.items():
        if stated.get(key, value) not in (value, [value, value]):
            raise ConfigError(
                f"media_proc_cfg.{key} is not implemented",
                expected=repr(value),
                found=repr(stated[key])[:80],
                where=path,
            )
    for key, most in (("in_patch_limit", 2**20), ("patch_limit_on_one_side", 2**12)):
        found = stated.get(key, 1)
        if not (is_number(found, int) and 1 <= found <= most):
            raise ConfigError(
                f"media_proc_cfg.{key} has no possible value",
                expected=f"1 to {most:,}",
                found=repr(found)[:80],
                where=path,
            )
