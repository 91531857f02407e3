"""Where the tensors of the vision tower and its projector lie, all of them checked; or why there are none.

Conversions to MLX usually leave the tower out, so it may come from a directory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.vision import KEPT_VECTORS, VisionConfig
from exo_kimi.checkpoint.index import CheckpointIndex, TensorEntry, read_shards
from exo_kimi.checkpoint.shards import find_shards
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_config
from exo_kimi.errors import (
    CheckpointError,
    CheckpointProblems,
    ConfigError,
    DtypeError,
    MissingTensorError,
    NotACheckpointError,
    ShapeMismatchError,
    UnexpectedTensorError,
    UsageError,
)
from exo_kimi.units import format_bytes

_ROOTS = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
_FIX = "take the tower from a directory that has all of it: --vision DIR; or serve text alone: --no-vision"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionManifest:
    """Every tensor of tower and projector, by its published name.

    Args:
        directory: where the files are.
        config: of both.
        entries: names -> tensors.
    """

    directory: Path
    config: VisionConfig
    entries: Mapping[str, TensorEntry]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights once they are loaded as stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of the vectors that a stage keeps, in the tower's dtype."""
        element_bytes = max(_FLOATS[entry.dtype] for entry in self.entries.values())
        return KEPT_VECTORS * self.config.hidden_size * element_bytes


@dataclass(frozen=True, slots=True)
class NoVision:
    """A checkpoint that takes no pictures, and why, as a sentence without its full stop."""

    reason: str


def find_vision(index: CheckpointIndex, directory: Path | None = None) -> VisionManifest | NoVision:
    """The tower of a checkpoint.

    Args:
        index: the checkpoint, whose config.json describes the tower.
        directory: where the tower's tensors are, if not beside the text model's.

    Raises:
        ConfigError, CheckpointProblems: config.json describes a tower that cannot be, or tensors are missing, are of another
            shape or dtype, or are more than the tower has.
        NotACheckpointError: `directory` holds no tower, or the checkpoint is one without vision.
    """
    if index.config.k3 is not None:
        return NoVision("the tower of a Kimi K3 is not read yet")
    where = index.directory / CONFIG_NAME
    described = index.raw_config.get("vision_config") is not None
    if described and directory is None and not any(name.startswith(_ROOTS) for name in map(_plain, index.tensors)):
        return NoVision(
            "config.json describes a vision tower, but the weights have none; --vision DIR names a directory that has it"
        )
    config = VisionConfig.from_dict(index.raw_config, hidden_size=index.config.hidden_size, where=where)
    if config is None:
        if directory is not None:
            raise NotACheckpointError(
                "this model takes no pictures", expected="vision_config", where=where, fix="leave --vision out"
            )
        return NoVision("config.json describes no vision tower")
    if directory is None:
        tensors, place = index.tensors, index.directory
    else:
        place = Path(directory)
        _check_same(index.raw_config, place)
        tensors = _tensors_in(place)
    found = {_plain(name): entry for name, entry in tensors.items() if _plain(name).startswith(_ROOTS)}
    if not found:
        raise NotACheckpointError(
            "no vision tower here", expected=f"{len(config.shapes)} tensors such as vision_tower.*", where=place
        )
    problems = _problems(config, found)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CheckpointProblems(problems, where=place)
    return VisionManifest(directory=place, config=config, entries=found)


def tower_findings(index: CheckpointIndex) -> tuple[tuple[str, ...], tuple[CheckpointError, ...]]:
    """What is to be said of a checkpoint's tower, and what is wrong with it; nothing of a model that takes no pictures."""
    if index.raw_config.get("vision_config") is None:
        return (), ()
    try:
        found = find_vision(index)
    except CheckpointProblems as error:
        return (), tuple(each for each in error.problems if isinstance(each, CheckpointError))
    except CheckpointError as error:
        return (), (error,)
    if isinstance(found, NoVision):
        return (f"text only: {found.reason}",), ()
    size = format_bytes(found.resident_bytes)
    return (f"takes pictures: a vision tower of {len(found.entries)} tensors, {size}, for the first stage",), ()


def chosen_tower(
    index: CheckpointIndex, directory: Path | None = None, *, no_vision: bool = False
) -> VisionManifest | NoVision:
    """`find_vision` as options ask for it.

    Raises:
        UsageError: a directory for a tower that is not wanted.
        CheckpointError: as `find_vision`.
    """
    if no_vision and directory is not None:
        raise UsageError("--vision and --no-vision contradict each other", fix="give one of them")
    return NoVision("it was started with --no-vision") if no_vision else find_vision(index, directory)


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _check_same(raw: Mapping[str, Any], place: Path) -> None:
    """A second directory may say nothing of its tower, but nothing else than the first."""
    if not (place / CONFIG_NAME).exists():
        return
    other = read_config(place).get("vision_config")
    if other is not None and other != raw["vision_config"]:
        differ = sorted(
            key for key in {*other, *raw["vision_config"]} if other.get(key) != raw["vision_config"].get(key)
        )
        raise ConfigError(
            "the tower of another model",
            expected="the same vision_config",
            found=f"other {', '.join(differ[:5])}",
            where=place / CONFIG_NAME,
            fix="give the tower that was published with this model",
        )


def _tensors_in(place: Path) -> Mapping[str, TensorEntry]:
    if not place.is_dir():
        raise NotACheckpointError(
            "no such directory for the vision tower",
            found=place,
            where="--vision",
            fix="give the folder of its *.safetensors",
        )
    found = read_shards(find_shards(place))
    if found.problems:
        raise CheckpointProblems([problem.error for problem in found.problems], where=place)
    return found.tensors


def _problems(config: VisionConfig, found: Mapping[str, TensorEntry]) -> list[CheckpointError]:
    shapes = config.shapes
    problems: list[CheckpointError] = []
    missing = [name for name in shapes if name not in found]
    if missing:
        problems.append(
            MissingTensorError(
                f"the vision tower lacks {len(missing)} of its tensors",
                expected=f"{len(shapes)} tensors",
                found=f"{len(shapes) - len(missing)}; the first that is not there: {missing[0]}",
                fix=_FIX,
            )
        )
    more = [name for name in found if name not in shapes]
    if more:
        problems.append(
            UnexpectedTensorError(
                f"the vision tower has no place for {len(more)} of the tensors under its names",
                found=more[0],
                where=found[more[0]].file,
                fix=_FIX,
            )
        )
    for name, entry in found.items():
        if name in shapes and entry.shape != shapes[name]:
            problems.append(
                ShapeMismatchError(entry.name, expected=shapes[name], found=entry.shape, where=entry.file, fix=_FIX)
            )
        elif name in shapes and entry.dtype not in _FLOATS:
            problems.append(
                DtypeError(entry.name, expected=" or ".join(_FLOATS), found=entry.dtype, where=entry.file, fix=_FIX)
            )
    return problems
