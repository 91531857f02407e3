"""Plots of a comparison as inline SVG, drawn here: a report is one file that opens anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.compare.intervals import Estimate

OURS, THEIRS, INK, FAINT = "#2563eb", "#c2410c", "#1f2937", "#d8dde5"
_WIDTH, _LEFT, _ROW = 720, 150, 28
_FLOOR = 1e-8  # nats: below, a logarithm shows rounding


def interval_plot(rows: Sequence[tuple[str, Estimate]], *, unit: str) -> str:
    """A dot with its interval for each row, on a common scale from 0."""
    top = max((estimate.high for _, estimate in rows), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - 110) / top
    parts = [_line(_LEFT, 0, _LEFT, _ROW * len(rows), FAINT)]
    for index, (name, estimate) in enumerate(rows):
        y = _ROW * index + _ROW / 2
        left, right, at = (_LEFT + scale * max(0.0, value) for value in (estimate.low, estimate.high, estimate.value))
        parts += [
            _text(_LEFT - 8, y + 4, name, anchor="end"),
            _line(left, y, right, y, OURS, width=3),
            f'<circle cx="{at:.1f}" cy="{y:.1f}" r="4.5" fill="{OURS}"/>',
            _text(right + 8, y + 4, f"{estimate.value:.4g}"),
        ]
    parts.append(_text(_LEFT, _ROW * len(rows) + 16, unit, size=11))
    return _svg(parts, _ROW * len(rows) + 24)


def line_plot(lines: Sequence[tuple[str, Sequence[float]]], labels: Sequence[int], *, unit: str) -> str:
    """One line a series over layers, from 0."""
    height = 200
    top = max((value for _, values in lines for value in values), default=0.0) or 1.0
    wide = (_WIDTH - 80 - 130) / max(1, len(labels) - 1)
    parts = [_line(60, 10, 60, height, FAINT), _line(60, height, _WIDTH - 140, height, FAINT)]
    for share in (0.5, 1.0):
        y = height - (height - 20) * share
        parts += [_line(56, y, 60, y, INK), _text(52, y + 4, f"{top * share:.2g}", anchor="end", size=11)]
    for (name, values), colour in zip(lines, (OURS, THEIRS, INK), strict=False):
        points = [(60 + wide * index, height - (height - 20) * value / top) for index, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        if points:
            parts.append(_text(points[-1][0] + 8, points[-1][1] + 4, name, colour=colour))
    every = max(1, len(labels) // 12)
    parts += [
        _text(60 + wide * index, height + 16, str(label), anchor="middle", size=11)
        for index, label in enumerate(labels)
        if index % every == 0
    ]
    parts.append(_text(60, height + 34, unit, size=11))
    return _svg(parts, height + 42)


def histogram(values: NDArray[np.float64], *, unit: str, bins: int = 32) -> str:
    """How many places have which value, on a logarithmic axis; what is under its end is counted at the end."""
    if not len(values):
        return ""
    logs = np.log10(np.maximum(values, _FLOOR))
    low, high = math.floor(float(logs.min())), math.ceil(float(logs.max()) + 1e-9)
    counts, edges = np.histogram(logs, bins=bins, range=(low, max(high, low + 1)))
    height, wide = 160, (_WIDTH - 80) / bins
    tallest = int(counts.max())
    parts = []
    for index, count in enumerate(counts.tolist()):
        tall = (height - 20) * count / tallest
        parts.append(
            f'<rect x="{60 + wide * index:.1f}" y="{height - tall:.1f}" width="{wide - 1:.1f}" height="{tall:.1f}" '
            f'fill="{OURS}"><title>{count} places, 1e{edges[index]:.2f} to 1e{edges[index + 1]:.2f}</title></rect>'
        )
    parts.append(_line(60, height, _WIDTH - 20, height, INK))
    for power in range(low, max(high, low + 1) + 1):
        x = 60 + (_WIDTH - 80) * (power - low) / max(1, max(high, low + 1) - low)
        parts.append(_text(x, height + 16, f"1e{power}", anchor="middle", size=11))
    parts.append(_text(60, height + 34, unit, size=11))
    return _svg(parts, height + 42)


def _svg(parts: Iterable[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="13">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
