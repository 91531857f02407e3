"""How a transfer is shown: a line that moves on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from exo_kimi.fetch.pull import PullReport
from exo_kimi.fetch.transfer import TransferProgress
from exo_kimi.units import format_bytes, format_seconds

LINE_S = 10.0
TERMINAL_S = 0.25


@contextmanager
def shown(progress: TransferProgress) -> Iterator[None]:
    """Show a transfer on the standard error while the context is open."""
    on_terminal = sys.stderr.isatty()
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(TERMINAL_S if on_terminal else LINE_S):
            _write(progress_line(progress), on_terminal)

    thread = threading.Thread(target=show, name="fetch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _write(progress_line(progress), on_terminal)
        if on_terminal:
            print(file=sys.stderr)


def progress_line(progress: TransferProgress) -> str:
    """`12.4 % of 4.21 GiB, 118.20 MiB/s, 31 s left`."""
    share = 100 * progress.done_bytes / progress.total_bytes if progress.total_bytes else 100.0
    line = f"{share:.1f} % of {format_bytes(progress.total_bytes)}, {format_bytes(int(progress.bytes_per_s))}/s"
    if progress.left_s is not None and progress.done_bytes < progress.total_bytes:
        line += f", {format_seconds(progress.left_s)} left"
    return f"{line} ({progress.state})" if progress.state else line


def summary(report: PullReport, *, dry_run: bool) -> str:
    """What a pull did, for the standard output."""
    layers = "all layers" if report.layers is None else f"layers {report.layers[0]}:{report.layers[1]}"
    revision, size = report.listing.revision[:12], format_bytes(report.size_bytes)
    lines = [
        f"{report.listing.model} at {revision} ({report.listing.where}): {layers}, {size} ({report.size_bytes} bytes)"
    ]
    came = f"{format_bytes(report.fetched_bytes)} ({report.fetched_bytes} bytes)"
    if dry_run:
        lines.append(f"to fetch   {came}; {format_bytes(report.free_bytes)} would be free after it")
    else:
        lines.append(
            f"fetched    {came} in {format_seconds(report.took_s)}; {format_bytes(report.free_bytes)} are free"
        )
    if report.cut:
        lines.append(
            f"cut        {len(report.cut)} files hold this share's part of the source's and the header of the whole"
        )
    lines += [f"kept       {name}, which was here and is not the source's" for name in report.kept]
    lines.append(f"directory  {report.directory}")
    return "\n".join(lines)


def _write(line: str, on_terminal: bool) -> None:
    if on_terminal:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)
