"""`exo-kimi pull`: a model, or one machine's share of it, from a source into a directory.

report = pull(HubSource("ORG/NAME"), directory, layers=(44, 61))
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.hashes import CUT_HASHES, hub_hashes
from exo_kimi.checkpoint.keys import layer_of
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.shares import share_names
from exo_kimi.checkpoint.vision import VisionManifest, chosen_tower
from exo_kimi.errors import MachineError, NotHeldError, UsageError
from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.part import PartFile, held_before, missing_bytes
from exo_kimi.fetch.skeleton import read_skeleton
from exo_kimi.fetch.source import Listing, RemoteFile, Source
from exo_kimi.fetch.targets import FileTarget, held_names, share_of_model, total_bytes, whole_model
from exo_kimi.fetch.transfer import CONNECTIONS, Transfer, TransferProgress, is_content
from exo_kimi.planner.matching import check_matches
from exo_kimi.planner.plan import Plan
from exo_kimi.units import format_bytes

_WORK = Path(".cache") / "exo-kimi"
RECORDS = Path(".cache") / "huggingface" / "download"  # where huggingface_hub keeps the same records

Say = Callable[[str], None]
Watch = Callable[[TransferProgress], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """What is to be fetched, and how.

    Args:
        layers: half-open range; None takes the whole model.
        plan: that the layers are of; it is held against every header of the model.
        no_vision: leave the vision tower out of a share that begins with layer 0.
        whole_files: fetch files whole of which a share needs a part, so that their SHA-256 can be checked.
        connections: requests at a time.
        dry_run: say what would be fetched, and fetch nothing but headers.
    """

    layers: tuple[int, int] | None = None
    plan: Plan | None = None
    no_vision: bool = False
    whole_files: bool = False
    connections: int = CONNECTIONS
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull did, or would do.

    Args:
        directory: where the files are.
        listing: of the source.
        layers: half-open range; None is the whole model.
        size_bytes: of all files together.
        fetched_bytes: that came; of a dry run, that would come. Headers are not counted.
        free_bytes: of the disk, afterwards.
        cut: names of files that hold a part of the source's.
        kept: texts that were here and differ from the source's.
        took_s: how long it took.
    """

    directory: Path
    listing: Listing
    layers: tuple[int, int] | None
    size_bytes: int
    fetched_bytes: int
    free_bytes: int
    cut: tuple[str, ...]
    kept: tuple[str, ...]
    took_s: float


def pull(
    source: Source,
    directory: Path,
    options: PullOptions,
    *,
    say: Say = lambda _: None,
    watch: Watch | None = None,
) -> PullReport:
    """Fetch what is missing of a model, or of a share of it.

    Args:
        source: has the model.
        directory: made when missing; what is in it already is kept and counted.
        options: what of it.
        say: takes lines for the user.
        watch: shows the progress while its context is open.

    Raises:
        FetchError: the source fails; what came is kept, and the same call goes on there.
        MachineError: the disk has no room.
        UsageError: the directory has other files under the same names, cannot be written, or another pull is at work in it.
        CheckpointError: the model is none that exo-kimi reads.
        SplitError: no such layers.
        PlanMismatchError: the plan is of another model.
        NotHeldError: the source has a share itself, without what is to be fetched.
    """
    began_s = time.monotonic()
    listing = source.listing()
    skeleton, targets = _targets(source, listing, options, say)
    if options.dry_run:
        waiting, kept = _missing(targets, directory)
        fetched = sum(
            missing_bytes(
                target,
                directory / _WORK,
                held_before(target, directory, skeleton),
                revision=listing.revision,
            )
            for target in waiting
        )
        free = free_bytes(directory) - fetched
    else:
        work = directory / _WORK
        with _writing(directory):
            work.mkdir(parents=True, exist_ok=True)
            with _alone(work):
                waiting, kept = _missing(targets, directory, verify=say)
                records = _Records(directory, listing)
                parts = [
                    PartFile(target, directory, work, revision=listing.revision, skeleton=skeleton)
                    for target in waiting
                ]
                fetched = _transfer(source, parts, total_bytes(targets), records, options, say=say, watch=watch)
        free = free_bytes(directory)
    return PullReport(
        directory=directory,
        listing=listing,
        layers=options.layers,
        size_bytes=total_bytes(targets),
        fetched_bytes=fetched,
        free_bytes=free,
        cut=tuple(target.file.name for target in targets if not target.is_whole),
        kept=tuple(kept),
        took_s=time.monotonic() - began_s,
    )


def _transfer(
    source: Source,
    parts: Sequence[PartFile],
    all_bytes: int,
    records: _Records,
    options: PullOptions,
    *,
    say: Say,
    watch: Watch | None,
) -> int:
    """Fetch what the parts lack; returns the bytes that came."""
    directory = records.directory
    missing = sum(part.missing_bytes for part in parts)
    free = check_room(directory, missing)
    say(f"{format_bytes(missing)} to fetch into {directory}; {format_bytes(free - missing)} will be free then")
    progress = TransferProgress(total_bytes=all_bytes, done_bytes=all_bytes - missing)
    index = [part for part in parts if part.target.file.name == INDEX_NAME]
    with watch(progress) if watch is not None else nullcontext():
        for now in (
            [part for part in parts if part not in index],
            index,
        ):  # the index last, when all that it names is there
            Transfer(source, now, progress, on_file=records.add, connections=options.connections).run()
    return progress.fetched_bytes


def _targets(source: Source, listing: Listing, options: PullOptions, say: Say) -> tuple[Path | None, list[FileTarget]]:
    """The files to have, and the headers that say so; None where nothing has to be cut."""
    in_part = any(file.held is not None for file in listing.files.values())
    if options.layers is None and not in_part:
        return None, whole_model(listing)
    say(f"reading the headers of {listing.model}")
    skeleton = read_skeleton(source, listing)
    if options.layers is None:
        return skeleton, share_of_model(listing, skeleton, held_names(listing, skeleton))
    checkpoint = Checkpoint(skeleton)
    if options.plan is not None:
        check_matches(options.plan, checkpoint.manifest())
    start, end = options.layers
    manifest = checkpoint.manifest(start, end)
    tower = chosen_tower(checkpoint.index, no_vision=options.no_vision) if start == 0 else None
    more = tower.entries.values() if isinstance(tower, VisionManifest) else ()
    names = share_names(checkpoint.index, manifest, more)
    lacking = names - held_names(listing, skeleton) if in_part else frozenset()
    if lacking:
        layers = sorted({layer for layer in map(layer_of, lacking) if layer is not None})
        raise NotHeldError(
            f"the other machine does not have all of layers {start}:{end}",
            expected=f"{len(names):,} tensors",
            found=f"{len(lacking):,} of them are not there" + (f", the first of layer {layers[0]}" if layers else ""),
            where=listing.where,
            fix="fetch the layers that it has (without --layers: all of them), and the others from the hub",
        )
    whole_files = options.whole_files and not in_part
    return skeleton, share_of_model(listing, skeleton, names, whole_files=whole_files)


def _missing(
    targets: Sequence[FileTarget], directory: Path, *, verify: Say | None = None
) -> tuple[list[FileTarget], list[str]]:
    """Targets that are not here, and texts that are here and differ. With `verify`, which takes lines for the user, weights
    that nobody has verified are.

    Raises:
        UsageError: a weight file is here that is not the source's.
    """
    known = _known(directory)
    waiting: list[FileTarget] = []
    kept: list[str] = []
    for target in targets:
        path = directory / target.file.name
        if not path.exists():
            waiting.append(target)
        elif path.suffix != ".safetensors":
            if (target.file.sha256 or target.file.git_sha1) and not is_content(path, target.file):
                kept.append(path.name)
        elif not _has_all(held := _held(path, target), target, known.get(path.name), verify):
            waiting.append(target.beside(held))
    return waiting, kept


def _held(path: Path, target: FileTarget) -> HeldFile:
    """A weight file that is here, if it is the source's or a cut of that."""
    try:
        held = HeldFile.open(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _another(path) from None
    if not target.is_of(held):
        raise _another(path)
    return held


def _has_all(held: HeldFile, target: FileTarget, known: str | None, verify: Say | None) -> bool:
    expected = target.file.sha256
    if held.is_whole and verify is not None and expected is not None and known != expected:
        verify(f"{held.path.name} is here: verifying it")
        if not is_content(held.path, target.file):
            raise _another(held.path)
    return target.is_held_by(held)


def _another(path: Path) -> UsageError:
    return UsageError(
        f"{path.name} is here already and is not the source's",
        where=path,
        fix="give another directory with -o, or move this file away",
    )


def _known(directory: Path) -> dict[str, str]:
    """SHA-256 of files that were verified before, and not written since."""
    if not directory.is_dir():
        return {}
    hashes = hub_hashes(directory)
    for name in list(hashes):
        path, record = directory / name, directory / RECORDS / f"{name}.metadata"
        if not path.exists() or (record.exists() and path.stat().st_mtime > record.stat().st_mtime + 1):
            del hashes[name]
    return hashes


class _Records:
    """Notes of what was verified, where the hub's own downloader and `doctor --deep` look for them."""

    def __init__(self, directory: Path, listing: Listing) -> None:
        self.directory = directory
        self._listing = listing

    def add(self, part: PartFile, sha256: str | None) -> None:
        """Note one file that is in place."""
        file = part.target.file
        if part.target.is_whole and (file.sha256 or file.git_sha1):
            self._add_whole(file, sha256)
        elif sha256 is not None:
            with self.directory.joinpath(*CUT_HASHES).open("a", encoding="utf-8") as stream:
                stream.write(f"{sha256}  {file.name}\n")

    def _add_whole(self, file: RemoteFile, sha256: str | None) -> None:
        tag = file.git_sha1 or sha256
        folder = self.directory / RECORDS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{file.name}.metadata").write_text(f"{self._listing.revision}\n{tag}\n{time.time()}\n")


def check_room(directory: Path, needed_bytes: int) -> int:
    """Free bytes of the disk that a directory is on, or will be.

    Raises:
        MachineError: fewer than are needed.
    """
    free = free_bytes(directory)
    if needed_bytes > free:
        raise MachineError(
            f"the disk has no room: {format_bytes(needed_bytes - free)} short ({needed_bytes - free} bytes)",
            expected=f"{format_bytes(needed_bytes)} free",
            found=format_bytes(free),
            where=directory,
            fix="free some space, give a directory on another disk with -o, or fetch fewer layers with --layers",
        )
    return free


def free_bytes(directory: Path) -> int:
    """Free bytes of the disk that a directory is on, or will be."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What the disk refuses, as an error with its fix.

    Raises:
        MachineError: it is full.
        UsageError: nothing may be written there.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                "the disk is full",
                found=error.strerror,
                where=where,
                fix="free some space and run the same command again: it goes on where it was",
            ) from error
        raise UsageError("cannot write into the directory", found=error.strerror or error, where=where) from error


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Held while one pull is at work in a directory; the system lets go of it when the process ends."""
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("another pull is at work in this directory", where=work.parents[1]) from None
        yield
    finally:
        os.close(descriptor)
