"""The comparison of Kimi Delta Attention: both sides give the same, and a bar or an output that is off is a miss."""

from __future__ import annotations

import mlx.core as mx
import pytest

from exo_kimi.bench.claims.kda import measure as kda
from exo_kimi.bench.claims.kda.setup import DeltaLayers


@pytest.fixture(scope="module")
def layers() -> DeltaLayers:
    return DeltaLayers.random(heads=2, head_dim=32, hidden=64)


def test_it_compares_the_same_outputs_and_counts_both_sides(layers: DeltaLayers) -> None:
    result = kda.measure(layers, tokens=70, rounds=1)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "rule, peak",
        "rule, processor time",
        "layer, peak",
        "layer, processor time",
        "decode of a token",
    ]
    assert [rows[name].equal for name in ("rule, peak", "layer, peak", "decode of a token")] == [True] * 3
    assert all(row.ours > 0 and row.theirs for row in result.rows if "time" not in row.name)
    assert rows["decode of a token"].ok  # counted, and the same at any width


def test_a_count_above_its_bar_is_missed(layers: DeltaLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kda, "DECODE_BAR", 0.1)
    assert not kda.decode_row(layers).ok


def test_peak_and_time_above_their_bars_and_other_outputs_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(bytes_each: tuple[int, int], ours: float = 1.0) -> list[bool]:
        def measured(run: object) -> kda.MeasuredPrefill:
            one = run is list
            value = mx.array([ours if one else 1.0])
            return kda.MeasuredPrefill(bytes_each[not one] / 10, bytes_each[not one], [value])

        monkeypatch.setattr(kda, "measured", measured)
        return [row.ok for row in kda.prefill_rows("", list, list[mx.array], 1)]

    assert rows((1, 15)) == [True, True]
    assert rows((10, 140)) == [False, True]
    assert rows((8, 10)) == [False, False]
    assert rows((1, 15), ours=1.1) == [False, True]
