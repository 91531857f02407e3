"""The SHA-256 of files as the hub has them: from what its downloader leaves beside the files, or from a list of the user's."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.errors import UsageError

CUT_HASHES = (".cache", "exo-kimi", "cut.sha256")  # of the cut files of a share, as `exo-kimi pull` wrote them
_METADATA = (".cache", "huggingface", "download")
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(
    r"(?P<hash>[0-9a-fA-F]{64}) [ *](?P<name>.+)|SHA256 \((?P<bsd_name>.+)\) = (?P<bsd_hash>[0-9a-fA-F]{64})"
)


def hub_hashes(root: Path) -> dict[str, str]:
    """SHA-256 by file name, of the files of a directory for which a downloader left it; empty where it left none.

    `hf download --local-dir` writes `.cache/huggingface/download/NAME.metadata`, whose second line is the ETag; in the shared
    cache a file is a link into `blobs/`, where it is named by it. The ETag of a large file is its SHA-256, that of a small one is
    a shorter git hash. Of a cut file, which the hub does not have, it is what `exo-kimi pull` noted.
    Source: huggingface_hub, `_local_folder.py` and `file_download.py`.
    """
    found: dict[str, str] = {}
    with suppress(UsageError):
        found |= listed_hashes(root.joinpath(*CUT_HASHES))
    for path in sorted(root.iterdir()):
        blob = path.resolve() if path.is_symlink() else path
        if path.is_symlink() and blob.parent.name == "blobs" and _HEX.fullmatch(blob.name):
            found[path.name] = blob.name.lower()
    for metadata in sorted(root.joinpath(*_METADATA).glob("*.metadata")):
        try:
            lines = read_text(metadata).splitlines()
        except (OSError, ValueError):
            continue  # the downloader's own note, and no part of the checkpoint
        etag = lines[1].strip().strip('"') if len(lines) > 1 else ""
        if _HEX.fullmatch(etag):
            found[metadata.name.removesuffix(".metadata")] = etag.lower()
    return found


def listed_hashes(path: Path) -> dict[str, str]:
    """SHA-256 by file name, from a list as `sha256sum` or `shasum -a 256` write it; `#` begins a comment.

    Raises:
        UsageError: it cannot be read, or a line is of another form.
    """
    try:
        lines = read_text(path, encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError("cannot read the list of SHA-256", found=error, where=path) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(
                "a line of the list of SHA-256 cannot be read",
                expected="64 hexadecimal digits, two spaces and a file name, as sha256sum writes it",
                found=repr(line)[:80],
                where=f"{path}, line {number}",
            )
        name = Path(match["name"] or match["bsd_name"]).name
        found[name] = (match["hash"] or match["bsd_hash"]).lower()
    if not found:
        raise UsageError("the list of SHA-256 is empty", where=path)
    return found
