"""`exo-kimi share` and `pull --from` against a plain socket copy between two network namespaces.

    exo-kimi bench share [--bytes SIZE] [--files N] [--rounds N] [--rates LIST] [--unsynced]

Both copy the same files from one namespace's disk to the other's. The plain copy is one TCP connection, 1 MiB at a time, and
neither encrypts nor verifies; ours does both. In both every file is on the disk at the end (fsync), but for the plain one
with --unsynced, which may leave them in the page cache. The clock runs from the first connection to the last byte, verified,
without the start of interpreters. The ratio is plain seconds over ours. A rate is the cable's, as `tc` writes it; `none` is as
fast as the machine, where both sides and the kernel's cable share its processors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.bench.claims.share.namespaces import BLOCK_BYTES, SHARE_PORT, Namespace, two_namespaces
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.errors import MachineError, UsageError
from exo_kimi.fetch.part import file_sha256
from exo_kimi.fetch.pull import RECORDS
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, ClusterKey
from exo_kimi.units import parse_bytes

BAR = 0.8
COPY_S = 300.0
_COPIES = [sys.executable, "-m", "exo_kimi.bench.claims.share.copies"]


@dataclass(slots=True)
class CopyPair:
    """Both ways to copy one directory over one cable.

    Args:
        source: what is copied.
        folder: of the copies.
        here, there: who takes and who gives.
        key: of the cluster, as text.
        take: what the plain copy takes with.
    """

    source: Path
    folder: Path
    here: Namespace
    there: Namespace
    key: str
    take: str
    equal: bool = True
    copies: int = 0

    def ours(self) -> float:
        """Seconds of one `pull` from a running share."""
        target = self._target()
        taken = _ended(self.here.start([*_COPIES, "pull", str(target), self.there.host], EXO_KIMI_KEY=self.key))
        self._check(sorted(target.glob("*.safetensors")))
        return taken

    def plain(self) -> float:
        """Seconds of one plain copy."""
        target = self._target()
        giving = self.there.start([*_COPIES, "give", str(self.source), self.there.host])
        try:
            if giving.stdout is None or "listening" not in (line := giving.stdout.readline()):
                raise MachineError("the plain copy does not begin", found=line)
            taken = _ended(self.here.start([*_COPIES, self.take, str(target), self.there.host]))
        finally:
            giving.kill()
            giving.wait()
        self._check(sorted(target.iterdir(), key=lambda path: int(path.name)))
        return taken

    def _target(self) -> Path:
        self.copies += 1
        return self.folder / f"copy-{self.copies}"

    def _check(self, copies: Sequence[Path]) -> None:
        for path, copy in zip(sorted(self.source.glob("*.safetensors")), copies, strict=True):
            self.equal &= subprocess.run(["cmp", "-s", path, copy], check=False).returncode == 0
        shutil.rmtree(copies[0].parent)


def run(*, size_bytes: int, files: int, rounds: int, rates: Sequence[str], unsynced: bool) -> Result:
    """All rows."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="share-") as name:
        folder = Path(name)
        source = _checkpoint(folder / "source", size_bytes, files)
        for rate in rates:
            bound = None if rate == "none" else rate
            try:
                with two_namespaces(folder / "homes", rate=bound) as (here, there), _sharing(source, there) as key:
                    pair = CopyPair(source, folder, here, there, key, "take-unsynced" if unsynced else "take")
                    pairs = taken_in_turn(pair.ours, pair.plain, rounds=rounds)
            except MachineError as error:
                return Result(bench="share", skipped=f"{error.what}: {error.found}" if error.found else error.what)
            best = size_bytes / min(ours for ours, _ in pairs) / 1e6
            row = Row.of_pairs(
                f"cable of {rate}" if bound else f"no bound, {os.cpu_count()} processors for both sides",
                pairs,
                unit="s",
                bar=BAR,
                equal=pair.equal,
                note=f"best {best:,.0f} MB/s",
            )
            rows.append(row)
    ends = "theirs ends in the page cache" if unsynced else "both end on the disk"
    notes = [
        f"{size_bytes / 1e6:,.0f} MB in {files} files; {ends}",
        "ours is encrypted and each SHA-256 checked, theirs neither",
    ]
    return Result(bench="share", against="a plain socket copy", rows=rows, notes=notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench share", description="share and pull against a plain copy")
    parser.add_argument("--bytes", default="1GB", metavar="SIZE", help="of all files (default 1GB)")
    parser.add_argument("--files", type=int, default=16, metavar="N", help="how many (default 16)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs that count (default 5)")
    parser.add_argument(
        "--rates",
        default="1gbit,2500mbit,none",
        metavar="LIST",
        help="of the cable, separated by commas (default 1gbit,2500mbit,none)",
    )
    parser.add_argument("--unsynced", action="store_true", help="the plain copy may end in the page cache; ours never")
    options = parser.parse_args(argv)
    result = run(
        size_bytes=parse_bytes(options.bytes),
        files=options.files,
        rounds=options.rounds,
        rates=options.rates.split(","),
        unsynced=options.unsynced,
    )
    return finish(result, options)


def _checkpoint(directory: Path, size_bytes: int, files: int) -> Path:
    """Weight files of random bytes, with the SHA-256 that a pull from the hub would have noted."""
    records = directory / RECORDS
    records.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    each = size_bytes // files
    for number in range(1, files + 1):
        header = {f"model.layers.{number}.weight": {"dtype": "U8", "shape": [each], "data_offsets": [0, each]}}
        text = json.dumps(header).encode()
        path = directory / f"model-{number:05d}-of-{files:05d}.safetensors"
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, each, BLOCK_BYTES):
                stream.write(os.urandom(min(BLOCK_BYTES, each - start)))
        (records / f"{path.name}.metadata").write_text(f"{'0' * 40}\n{file_sha256(path)}\n{time.time()}\n")
    return directory


@contextmanager
def _sharing(source: Path, there: Namespace) -> Iterator[str]:
    """`exo-kimi share` in a namespace; gives the cluster key."""
    key = ClusterKey.generate().secret.decode()
    command = [sys.executable, "-m", "exo_kimi", "share", str(source), "--listen", f"{there.host}:{SHARE_PORT}"]
    sharing = there.start(command, **{ENVIRONMENT_NAME: key})
    try:
        line = sharing.stdout.readline() if sharing.stdout is not None else ""
        if not line.startswith("sharing"):
            raise UsageError("the share does not begin", found=line.strip())
        yield key
    finally:
        sharing.terminate()
        sharing.wait()


def _ended(copying: subprocess.Popen[str]) -> float:
    said, _ = copying.communicate(timeout=COPY_S)
    if copying.returncode:
        raise UsageError("a copy failed", found=said.strip()[-300:])
    return float(json.loads(said.splitlines()[-1])["took_s"])
