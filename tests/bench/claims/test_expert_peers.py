"""The comparison of experts from disk: what it says without a peer, and what it makes of figures."""

from __future__ import annotations

from typing import Any

import pytest

from exo_kimi.bench.claims import expert_peers as experts
from exo_kimi.bench.claims.expert_peers import measure


def test_without_a_peer_it_is_skipped() -> None:
    assert measure(None, 1).skipped == "no --peer: the Python of an environment with mlx-vlm"


def figures(decode_s: float, read_bytes: int, **changes: Any) -> dict[str, Any]:
    counted = {"hits": 30, "misses": 10, "peak_bytes": 10**8, "prefill_s": 1.0, "tokens": [1, 2]}
    processor = {"prefill_cpu_s": 1.0, "decode_cpu_s": decode_s}
    return {"decode_s": decode_s, "read_bytes": read_bytes, **counted, **processor, **changes}


def test_rows_say_who_is_ahead() -> None:
    pairs = [(figures(1.0, 100), figures(2.0, 200, prefill_s=3.0))] * 2
    decode, read, first, _, processor, peak = experts._rows(0.25, pairs)
    assert processor.ratio == 2.0 and peak.ok and peak.ratio == 1.0
    assert (decode.ratio, read.ratio, first.ratio) == (2.0, 0.5, 3.0)
    assert decode.ours == pytest.approx(experts.NEW) and decode.ok and read.ok and first.ok
    behind = experts._rows(0.25, [(figures(2.0, 300), figures(1.0, 200))])
    assert [row.ok for row in behind] == [False, False, True, True, True, True]
    assert not experts._rows(0.25, [(figures(1.0, 1, peak_bytes=101), figures(1.0, 1, peak_bytes=100))])[-1].ok
    differing = experts._rows(0.25, [(figures(1.0, 100, tokens=[1, 3]), figures(2.0, 200))])
    assert not differing[0].ok, "faster with other tokens is no win"
