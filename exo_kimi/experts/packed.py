"""Side files with one aligned record for each expert, in place of up to nine ranges of the checkpoint's files.

They lie in `experts.packed` inside the checkpoint's directory, a file of records and one of JSON for each layer, and hold the
very bytes of the tensors. The JSON names the tensors, their files and when they were written, and records of others are not used.
A layer's records are read back from the disk and compared with a checksum of what was written before they count.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.tensor_files import TensorFiles
from exo_kimi.errors import UsageError
from exo_kimi.experts.direct import F_NOCACHE
from exo_kimi.experts.layout import LayerLayout, StoredPart, layouts_of
from exo_kimi.units import format_bytes

logger = logging.getLogger(__name__)

FOLDER = "experts.packed"
VERSION = 2
ALIGN_BYTES = 16 * 1024
"""The page of a Mac, and a multiple of every disk's block."""


PIECE_BYTES = 8 * 1024**2


def pack_directory(directory: Path, *, say: Callable[[str], None], verify: bool = False) -> str:
    """Write the records of every layer that has none of these weights yet; what was written before stays.

    Args:
        directory: the checkpoint.
        say: called with a line of progress after each layer.
        verify: read those of before again, and write anew the layers whose checksum is another.

    Returns:
        What there is to say of it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UsageError: it has no routed experts, or there is no room, or the files cannot be written, or read back.
    """
    layouts = layouts_of(Checkpoint(directory).manifest().sources)
    if not layouts:
        raise UsageError("a model without routed experts has nothing to pack", where=directory)
    missing = [layout for layout in layouts.values() if not _is_there(layout, directory, verify=verify, say=say)]
    need_bytes = sum(layout.experts * _record_bytes(layout) for layout in missing)
    free_bytes = shutil.disk_usage(directory).free
    if need_bytes > free_bytes:
        raise UsageError(
            "the disk has no room for the records",
            expected=format_bytes(need_bytes),
            found=f"{format_bytes(free_bytes)} free",
            where=directory / FOLDER,
        )
    files = TensorFiles(directory)
    try:
        (directory / FOLDER).mkdir(exist_ok=True)
        for number, layout in enumerate(missing, start=1):
            _write(layout, directory, files)
            say(f"layer {layout.layer}, {number} of {len(missing)}")
    except OSError as error:
        raise UsageError(
            "the records cannot be written", found=error.strerror, where=error.filename or directory / FOLDER
        ) from None
    finally:
        files.close()
    whole_bytes = sum(layout.experts * _record_bytes(layout) for layout in layouts.values())
    return (
        f"{len(layouts)} layers of experts, {format_bytes(whole_bytes)}, are in {directory / FOLDER}; "
        "`--expert-cache` reads them there"
    )


def packed_layout(layout: LayerLayout, directory: Path) -> LayerLayout:
    """The same experts in the records of their layer; unchanged where there are none of these weights.

    Args:
        layout: of the checkpoint's own files.
        directory: the checkpoint.
    """
    described = _described(layout, directory)
    if described is None:
        if _json_file(layout, directory).exists():
            logger.warning(
                "%s is of other weights, or damaged, and not used: `exo-kimi experts pack %s` writes it anew",
                _json_file(layout, directory),
                directory,
            )
        return layout
    file, size = f"{FOLDER}/{_records_file(layout, directory).name}", _record_bytes(layout)
    offset = 0

    def moved(part: StoredPart | None) -> StoredPart | None:
        nonlocal offset
        if part is None:
            return None
        entries = []
        for expert in range(layout.experts):
            old, start = part.range_of(expert).entry, expert * size + offset
            entries.append(TensorEntry(old.name, part.dtype, part.shape, file, start, start + part.nbytes))
        offset += part.nbytes
        return StoredPart(tuple(entries), layout.experts)

    projections = []
    for projection in layout.projections:
        leaves = [replace(leaf, stored=moved(leaf.stored), scale=moved(leaf.scale)) for leaf in projection.leaves]
        projections.append(replace(projection, leaves=tuple(leaves)))
    return replace(layout, projections=tuple(projections))


def _write(layout: LayerLayout, directory: Path, files: TensorFiles) -> None:
    """The records first and what describes them last, each under another name until it is whole."""
    records = _records_file(layout, directory)
    part = records.with_suffix(".part")
    buffer = memoryview(bytearray(_record_bytes(layout)))
    digest = hashlib.sha256()
    with part.open("wb") as out:
        for expert in range(layout.experts):
            start = 0
            for each in layout.expert_bytes(expert):
                _read(files, each.entry, each.start, buffer[start : start + each.nbytes])
                start += each.nbytes
            out.write(buffer)
            digest.update(buffer)
        out.flush()
        os.fsync(out.fileno())
    wanted = digest.hexdigest()
    if _checksum(part) != wanted:
        part.unlink()
        raise UsageError(
            "the disk does not give back what was written", expected=f"sha256 {wanted}", found="another", where=part
        )
    part.replace(records)
    described = _json_file(layout, directory)
    draft = described.with_suffix(".part")
    draft.write_text(json.dumps({**_description(layout, directory), "sha256": wanted}, indent=1) + "\n")
    draft.replace(described)


def _is_there(layout: LayerLayout, directory: Path, *, verify: bool, say: Callable[[str], None]) -> bool:
    described = _described(layout, directory)
    if described is None or not verify:
        return described is not None
    if _checksum(_records_file(layout, directory)) == described["sha256"]:
        say(f"layer {layout.layer} is as it was written")
        return True
    say(f"layer {layout.layer} is damaged, and written anew")
    return False


def _checksum(path: Path) -> str:
    """SHA-256 of a file as the disk gives it, not memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            fcntl.fcntl(file.fileno(), F_NOCACHE, 1)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _read(files: TensorFiles, entry: TensorEntry, position: int, view: memoryview) -> None:
    descriptor = files.descriptor(entry)
    while view:
        count = os.preadv(descriptor, [view], position)
        if count <= 0:
            raise files.cut(entry, position)
        view, position = view[count:], position + count


def _described(layout: LayerLayout, directory: Path) -> dict[str, Any] | None:
    """What describes a layer's records, if they are whole and of these weights."""
    try:
        found = json.loads(_json_file(layout, directory).read_text())
        size_bytes = _records_file(layout, directory).stat().st_size
    except (OSError, ValueError):
        return None
    wanted = _description(layout, directory)
    is_same = isinstance(found, dict) and {**wanted, "sha256": found.get("sha256")} == found
    return found if is_same and size_bytes == layout.experts * wanted["record_bytes"] else None


def _description(layout: LayerLayout, directory: Path) -> dict[str, Any]:
    entries = sorted({part.entry for expert in range(layout.experts) for part in layout.expert_bytes(expert)})
    digest = hashlib.sha256("\n".join(map(repr, map(tuple, entries))).encode())
    files = sorted({entry.file for entry in entries})
    return {
        "version": VERSION,
        "layer": layout.layer,
        "experts": layout.experts,
        "record_bytes": _record_bytes(layout),
        "parts": [f"{part.entry.name} {part.nbytes}" for part in layout.expert_bytes(0)],
        "tensors": digest.hexdigest(),
        "files": {file: [*_written(directory / file)] for file in files},
    }


def _written(path: Path) -> Iterator[int]:
    """Size and time of a file; whole seconds are what copies keep."""
    found = path.stat() if path.exists() else None
    yield found.st_size if found is not None else 0
    yield int(found.st_mtime) if found is not None else 0


def _record_bytes(layout: LayerLayout) -> int:
    return -(-layout.disk_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _records_file(layout: LayerLayout, directory: Path) -> Path:
    return directory / FOLDER / f"layer-{layout.layer:05}.records"


def _json_file(layout: LayerLayout, directory: Path) -> Path:
    return directory / FOLDER / f"layer-{layout.layer:05}.json"
