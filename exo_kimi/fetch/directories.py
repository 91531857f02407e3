"""Directories of models that were named: with headers for planning, with weights for serving; fetched where they are not here.

What fetches is imported when it is needed: most commands are given a directory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.shares import is_share
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.checkpoint.vision import VisionManifest, chosen_tower
from exo_kimi.errors import CheckpointError, HubUnreachableError, UsageError
from exo_kimi.fetch.names import directory_of, model_of
from exo_kimi.planner.plan import read_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPart:
    """What decides which layers of a model `exo-kimi serve` runs on this machine: its options of the same names."""

    plan: Path | None = None
    split: str | None = None
    stages: int | None = None
    stage: Sequence[str] = ()
    vision: Path | None = None
    no_vision: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServedPart:
        """Those of all options of the command."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


def headers_directory(given: Path, *, derive: bool = False) -> Path:
    """A directory to plan from: the one that was given, or for ORG/NAME the pulled one, else its headers from the hub.

    Args:
        given: a directory, or ORG/NAME.
        derive: see `read_skeleton`; said where it was done.

    Raises:
        FetchError: the hub does not give them.
        CheckpointError: the model is none that exo-kimi reads.
    """
    model = model_of(given)
    if model is None:
        return given
    for directory in _pulled(model):
        return directory
    from exo_kimi.fetch.hub import HubSource
    from exo_kimi.fetch.skeleton import is_derived, last_skeleton, read_skeleton

    source = HubSource(model)
    print(f"reading the headers of {model} from {source.endpoint}", file=sys.stderr, flush=True)
    try:
        skeleton = read_skeleton(source, source.listing(), derive=derive)
    except HubUnreachableError as error:
        known = last_skeleton(model)
        if known is None or (is_derived(known) and not derive):
            raise
        skeleton = known
        print(f"{error.what}: taking the headers of {known.parent.name[:12]}, read before", file=sys.stderr, flush=True)
    if is_derived(skeleton):
        said = (
            "where headers are large, those of layers alike are derived from one of them, by size, length and beginning"
        )
        print(f"{said}; `exo-kimi pull` reads them all", file=sys.stderr, flush=True)
    return skeleton


def weights_directory(given: Path) -> Path:
    """A directory to load from: the one that was given, or for ORG/NAME the pulled one.

    Raises:
        UsageError: it was not pulled.
    """
    model = model_of(given)
    if model is None:
        return given
    for directory in _pulled(model):
        return directory
    raise UsageError(
        "no such directory, and no model of this name was pulled",
        found=model,
        where=directory_of(model),
        fix=f"`exo-kimi pull {model}`, with --layers START:END for a share; or give a directory",
    )


def pulled_directory(text: str) -> Path | None:
    """The directory of ORG/NAME where it was pulled, else None: also for everything that is no such name."""
    model = model_of(text)
    return next(iter(_pulled(model)), None) if model is not None else None


def named_weights(text: str) -> str:
    """A directory, a file or a server's address as it was given; for ORG/NAME the pulled directory.

    Raises:
        UsageError: it is the name of a model that was not pulled.
    """
    return text if model_of(text) is None else str(weights_directory(Path(text)))


def served_directory(given: Path, part: ServedPart) -> Path:
    """A directory to serve from: the one that was given, or for ORG/NAME one with this machine's layers, fetched if need be.

    Raises:
        FetchError, MachineError: they cannot be fetched.
        CheckpointError, PlanError, UsageError: the model or an option cannot be followed.
    """
    model = model_of(given)
    if model is None:
        return given
    from exo_kimi.fetch.command import fetch_shown
    from exo_kimi.fetch.hub import HubSource
    from exo_kimi.fetch.pull import PullOptions

    checkpoint = Checkpoint(headers_directory(given))
    layers = local_layers(checkpoint, part)
    for directory in _pulled(model):
        if _has(Checkpoint(directory), layers):
            return directory
    options = PullOptions(layers=layers, no_vision=part.no_vision or part.vision is not None)
    return fetch_shown(HubSource(model), directory_of(model), options).directory


def local_layers(checkpoint: Checkpoint, part: ServedPart) -> tuple[int, int] | None:
    """The layers that `serve` runs on this machine; None for all.

    Raises:
        CheckpointError, PlanError, UsageError: the model or an option cannot be followed.
    """
    if not part.stage:
        return None
    from exo_kimi.runtime.cluster.cluster_plan import stage_ranges

    split = read_plan(part.plan).split if part.plan is not None else part.split
    tower = chosen_tower(checkpoint.index, part.vision, no_vision=part.no_vision)
    ranges = stage_ranges(
        checkpoint,
        split=split,
        stages=part.stages,
        remotes=len(part.stage),
        vision=tower if isinstance(tower, VisionManifest) else None,
    )
    local = ranges[: len(ranges) - len(part.stage)]
    return (local[0][0], local[-1][1]) if local else None


def _pulled(model: str) -> list[Path]:
    """Directories of this machine with the model, whole or a share: where `pull` puts it, and the hub's own cache."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, CONFIG_NAME)
    places = [directory_of(model), *([Path(cached).parent] if isinstance(cached, str) else [])]
    return [place for place in places if place.is_dir() and _is_complete(place)]


def _is_complete(directory: Path) -> bool:
    """Whether every weight file of a model is there, whole or cut: not while it is being fetched."""
    try:
        return not Checkpoint(directory).index.problems
    except CheckpointError:
        return False


def _has(checkpoint: Checkpoint, layers: tuple[int, int] | None) -> bool:
    if not is_share(checkpoint.index):
        return True
    try:
        (checkpoint.manifest(*layers) if layers is not None else checkpoint.manifest()).check_here()
    except CheckpointError:
        return False
    return True
