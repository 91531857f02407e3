"""Plots of outcomes as SVG, by matplotlib, which is optional (`pip install "exo-kimi[report]"`)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from exo_kimi.bench.frame import Row, figure
from exo_kimi.bench.outcome import BenchOutcome

OURS, THEIRS, GOOD, BAD, INK, FAINT = "#2563eb", "#b6bdc8", "#15803d", "#c2410c", "#1f2937", "#d8dde5"
_WIDTH, _ROW, _FRAME = 9.6, 0.44, 0.9  # inches
_STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.hashsalt": "exo-kimi",  # the same figures give the same bytes
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def overview(outcomes: Sequence[BenchOutcome]) -> str:
    """How far each claim is on the right side of its bar, as a factor; on the bar's line it is just met."""
    claims = [
        (f"{o.bench}: {row.name}", row) for o in outcomes for row in o.rows if row.bar is not None and row.bar > 0
    ]
    if not claims:
        return ""
    margins = [min(max(row.margin, 0.05), 1e3) for _, row in claims]

    def draw(axes: Any) -> None:
        rows = range(len(claims))
        colours = [GOOD if row.ok else BAD for _, row in claims]
        axes.hlines(rows, 1, margins, color=colours, linewidth=2.5, alpha=0.45)
        axes.scatter(margins, rows, color=colours, s=36, zorder=3)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        _factors(axes, min([0.8, *margins]), max([1.6, *margins]))
        axes.set_yticks(rows, [name for name, _ in claims])
        axes.set_xlabel("times better than the bar asks (at 1 it is just met)")
        axes.invert_yaxis()
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.tick_params(axis="y", length=0)

    return _svg(len(claims) * 0.75, 1, lambda panels: draw(panels[0]))


def of_bench(outcome: BenchOutcome) -> str:
    """Ours beside theirs, each pair scaled to its greater one; and the ratios with their quartiles and bars."""
    rows = [row for row in outcome.rows if row.theirs is not None or row.bar is not None]
    if not rows:
        return ""

    def draw(panels: Sequence[Any]) -> None:
        _pairs(panels[0], rows)
        _ratios(panels[1], rows)

    return _svg(len(rows), 2, draw)


def _pairs(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        greatest = max(row.ours, row.theirs or 0.0) or 1.0
        for value, shift, colour in ((row.ours, -0.19, OURS), (row.theirs, 0.19, THEIRS)):
            if value is not None:
                axes.barh(place + shift, value / greatest, height=0.34, color=colour)
                axes.text(value / greatest + 0.02, place + shift, figure(value, row.unit), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlim(0, 1.42)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title("ours (blue) and theirs (grey)", loc="left", fontsize=9.5)


def _ratios(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        colour = INK if row.bar is None else GOOD if row.ok else BAD
        if row.low is not None and row.high is not None:
            axes.hlines(place, max(row.low, 1e-6), max(row.high, 1e-6), color=colour, linewidth=4, alpha=0.35)
        axes.scatter([max(row.ratio, 1e-6)], [place], color=colour, s=30, zorder=3)
        if row.bar:
            arrow = ">" if row.direction == "at least" else "<"  # the side on which the bar is met
            axes.vlines(row.bar, place - 0.36, place + 0.36, color=INK, linewidth=1.4)
            axes.plot([row.bar], [place - 0.36], marker=arrow, color=INK, markersize=4)
    values = [max(value, 1e-6) for row in rows for value in (row.ratio, row.bar, row.low, row.high) if value]
    axes.set_xscale("log")
    _factors(axes, min([0.8, *values]), max([1.25, *values]))
    axes.axvline(1, color=FAINT, linewidth=1, zorder=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_title("ratio, its quartiles, and the bar", loc="left", fontsize=9.5)


def _factors(axes: Any, low: float, high: float) -> None:
    """Limits and ticks of a logarithmic axis, at 1, 2 and 5 times powers of ten."""
    low, high = low / 1.15, high * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ticks = ticks if len(ticks) <= 7 else [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _svg(rows: float, panels: int, draw: Any) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        drawing = Figure(figsize=(_WIDTH, rows * _ROW + _FRAME), layout="constrained")
        ratios = [1.25, 1.0] if panels == 2 else [1.0]
        draw(drawing.subplots(1, panels, squeeze=False, gridspec_kw={"width_ratios": ratios})[0])
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL).strip()
