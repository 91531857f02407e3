"""The bench of share: both copies give the same files."""

from __future__ import annotations

import json

import pytest

from exo_kimi.bench.claims.share.run import run


def test_both_copies_end_with_the_same_files() -> None:
    result = run(size_bytes=3_000_000, files=2, rounds=1, rates=["none"], unsynced=False)
    if result.skipped:
        pytest.skip(result.skipped)
    (row,) = result.rows
    assert row.equal and row.bar == 0.8 and row.theirs is not None
    assert json.loads(result.json_line())["bench"] == "share"
