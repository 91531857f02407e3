"""Which files a machine needs, and which byte ranges of each: pure arithmetic on a listing and its headers."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.checkpoint.safetensors_io import cut_head
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.skeleton import header_of, text_files, weight_files
from exo_kimi.fetch.source import Listing, RemoteFile

WHOLE_FROM = 0.995
"""A file of which so much is needed comes whole: only then its SHA-256 can be checked, and it is at most half a percent more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTarget:
    """One file to be there: some first bytes that are known, then ranges of the source's file, one after another.

    Args:
        file: at the source.
        head: first bytes, which are not fetched.
        ranges: half-open byte ranges of the whole file that follow.
        header: of the whole file, with its length; empty where it was not read.
        names: the tensors that were asked for, those of other files among them.
    """

    file: RemoteFile
    head: bytes
    ranges: tuple[tuple[int, int], ...]
    header: bytes = b""
    names: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Bytes of the file once it is there."""
        return len(self.head) + self.fetch_bytes

    @property
    def fetch_bytes(self) -> int:
        """Bytes that come from the source."""
        return sum(end - start for start, end in self.ranges)

    @property
    def is_whole(self) -> bool:
        """Whether it will be the source's file, byte by byte."""
        return self.size == self.file.size

    def is_of(self, held: HeldFile) -> bool:
        """Whether a file of this disk is the same file, or a cut of it, as far as its size, its header and its notes tell."""
        if held.size != self.file.size or (held.head and self.header and held.head != self.header):
            return False
        return held.sha256 is None or self.file.sha256 is None or held.sha256 == self.file.sha256

    def beside(self, held: HeldFile) -> FileTarget:
        """This target and what a cut file of this disk has, so that what is here stays."""
        if held.is_whole or not self.header or self.is_whole:
            return self
        return weight_target(self.file, self.header, self.names | held.names)

    def is_held_by(self, held: HeldFile) -> bool:
        """Whether a file of this disk has all of it already."""
        return all(held.holds(start, end) for start, end in self.ranges)


def whole_model(listing: Listing) -> list[FileTarget]:
    """Every file, the index of the weights last.

    Raises:
        NotACheckpointError: no weights, or no config.json.
    """
    index = [listing.files[INDEX_NAME]] if INDEX_NAME in listing.files else []
    return [_whole(file) for file in (*text_files(listing), *weight_files(listing), *index)]


def share_of_model(
    listing: Listing, skeleton: Path, names: Collection[str], *, whole_files: bool = False
) -> list[FileTarget]:
    """The files of a share, cut where a machine needs a part of them only.

    Args:
        listing: of the model.
        skeleton: its headers.
        names: the tensors of the share.
        whole_files: take every file whole that has more than norms of it.

    Raises:
        NotACheckpointError: no weights, or no config.json.
    """
    texts = [_whole(file) for file in text_files(listing)]
    weights = (
        weight_target(file, header_of(skeleton, file.name), names, whole_files=whole_files)
        for file in weight_files(listing)
    )
    return [*texts, *weights]


def weight_target(file: RemoteFile, header: bytes, names: Collection[str], *, whole_files: bool = False) -> FileTarget:
    """A weight file with some of its tensors: cut, or whole where that is about the same and the source has it.

    Args:
        file: at the source.
        header: of the whole file, with its length.
        names: tensors to have, those of other files among them.
        whole_files: see `share_of_model`.
    """
    head, ranges = cut_head(header[8:], names, sha256=file.sha256)
    kept, data_bytes = sum(end - start for start, end in ranges), file.size - len(header)
    rounds_up = file.held is None and (kept >= WHOLE_FROM * data_bytes or (whole_files and kept > 0.01 * data_bytes))
    if rounds_up or kept == data_bytes:
        head, ranges = header, [(len(header), file.size)]
    return FileTarget(file=file, head=head, ranges=tuple(ranges), header=header, names=frozenset(names))


def held_names(listing: Listing, skeleton: Path) -> frozenset[str]:
    """Names of the tensors that the source has, all or not."""
    names: set[str] = set()
    for file in weight_files(listing):
        header = header_of(skeleton, file.name)
        for name, fields in json.loads(header[8:]).items():
            if name != "__metadata__":
                start, end = fields["data_offsets"]
                if start == end or file.holds(len(header) + start, len(header) + end):
                    names.add(name)
    return frozenset(names)


def total_bytes(targets: Sequence[FileTarget]) -> int:
    """Bytes on the disk once all are there."""
    return sum(target.size for target in targets)


def _whole(file: RemoteFile) -> FileTarget:
    return FileTarget(file=file, head=b"", ranges=((0, file.size),) if file.size else ())
