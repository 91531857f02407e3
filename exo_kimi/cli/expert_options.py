"""The options of `serve` and `stage` for experts that stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from exo_kimi.cli.values import ExpertPolicy, ExpertPrefetch, ExpertReads, byte_count, one_of, option

STREAM = "Experts from disk"

CacheOption = Annotated[
    int | None,
    option(
        "--expert-cache",
        parser=byte_count,
        metavar="SIZE",
        help="memory of this machine for routed experts; the others are read from disk when a token asks for them "
        "(default: all are held)",
        panel=STREAM,
    ),
]
PolicyOption = Annotated[
    ExpertPolicy,
    option(
        "--expert-policy",
        metavar=one_of(ExpertPolicy),
        help="which expert gives way to another (default lru); pinned keeps those of --expert-profile",
        panel=STREAM,
    ),
]
ProfileOption = Annotated[
    Path | None,
    option(
        "--expert-profile",
        metavar="TRACE",
        help="of `trace record` or --trace-experts: its most used experts stay, in half of the slots",
        panel=STREAM,
    ),
]
TraceOption = Annotated[
    Path | None,
    option(
        "--trace-experts",
        metavar="FILE",
        help="write down which experts are asked for, for `trace replay`; of several stages each has a file (default: none)",
        panel=STREAM,
    ),
]
PrefetchOption = Annotated[
    ExpertPrefetch,
    option(
        "--expert-prefetch",
        metavar=one_of(ExpertPrefetch),
        help="read what the next layer may ask for while this one computes: where it is measured to win (default auto)",
        panel=STREAM,
    ),
]
ReadsOption = Annotated[
    ExpertReads,
    option(
        "--expert-reads",
        metavar=one_of(ExpertReads),
        help="through the page cache or past it: by what free memory could hold of the experts (default auto)",
        panel=STREAM,
    ),
]
