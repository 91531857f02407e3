"""A plan as SVG: one bar per machine in one scale."""

from __future__ import annotations

from xml.sax.saxutils import escape

from exo_kimi.planner.plan import Plan, PlanStage
from exo_kimi.planner.show.picture import context_speeds, decode_speed, parts_of
from exo_kimi.units import format_bytes, format_gb

WIDTH, MARGIN, ROW, BAR, LINE = 960, 32, 104, 34, 20
TOP, BOTTOM = 112, 52
COLORS = {
    "weights": "#2f5d8a",
    "expert slots": "#7fa6cf",
    "KV": "#3f9b8f",
    "scratch": "#e0a63c",
    "reserve": "#c26a4a",
    "headroom": "#dfe5ea",
    "macOS": "#f6f7f8",
}
_FONT = "font-family=\"-apple-system, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif\""


def svg(plan: Plan) -> str:
    """The plan as an SVG document, the same text for the same plan."""
    notes = _notes(plan)
    height = TOP + ROW * len(plan.stages) + BOTTOM + LINE * len(notes)
    largest_bytes = max(stage.memory_bytes for stage in plan.stages)
    scale = (WIDTH - 2 * MARGIN) / largest_bytes
    body = [*_heading(plan), *_legend(plan)]
    for index, stage in enumerate(plan.stages):
        body += _row(stage, TOP + ROW * index, scale)
    body += _footer(plan, notes, TOP + ROW * len(plan.stages))
    title = escape(f"{plan.model.name} split {plan.split}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" {_FONT}>',
            f"<title>{title}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _heading(plan: Plan) -> list[str]:
    workload = plan.workload
    about = f"{plan.model.source}, {format_gb(plan.model.total_bytes)}, {plan.model.layers} layers"
    sequences = f"{workload.concurrency} sequence{'' if workload.concurrency == 1 else 's'}"
    return [
        _text(MARGIN, 40, f"{plan.model.name}   {plan.split.replace(',', ' | ')}", size=22, weight=600),
        _text(
            MARGIN,
            62,
            f"{about}; context {workload.context:,}, {sequences}; best {plan.objective}",
            size=13,
            fill="#5b6770",
        ),
    ]


def _legend(plan: Plan) -> list[str]:
    out, x = [], MARGIN
    shown = {part.name for stage in plan.stages for part in parts_of(stage)}
    for name, color in ((name, color) for name, color in COLORS.items() if name in shown):
        label = {"reserve": "reserve and server", "macOS": "left to macOS"}.get(name, name)
        out.append(_box(x, 76, 12, 12, color))
        out.append(_text(x + 18, 87, label, size=12, fill="#5b6770"))
        x += 46 + 7 * len(label)
    return out


def _row(stage: PlanStage, top: int, scale: float) -> list[str]:
    name = f"{stage.machine}   layers {stage.start_layer}:{stage.end_layer}"
    need = f"{format_bytes(stage.need_bytes)} of {format_bytes(stage.limit_bytes)}"
    out = [
        _text(MARGIN, top + 22, name, size=14, weight=600),
        _text(WIDTH - MARGIN, top + 22, f"{stage.layers} layers, {need}", size=13, fill="#5b6770", anchor="end"),
    ]
    x = float(MARGIN)
    for part in parts_of(stage):
        width = part.size_bytes * scale
        tip = f"{part.name}: {format_bytes(part.size_bytes)}"
        out.append(_box(x, top + 32, width, BAR, COLORS[part.name], tip))
        if width > 9 * len(tip):
            dark = part.name in ("headroom", "macOS")
            out.append(_text(x + 8, top + 54, tip.replace(":", ""), size=12, fill="#5b6770" if dark else "#ffffff"))
        x += width
    limit = MARGIN + stage.limit_bytes * scale
    out.append(_box(MARGIN, top + 32, stage.memory_bytes * scale, BAR, "none", stroke="#9aa5ad"))
    out.append(
        f'<line x1="{limit:.1f}" y1="{top + 27}" x2="{limit:.1f}" y2="{top + 71}" stroke="#b3261e" stroke-width="2"/>'
    )
    raised = " (raised)" if stage.sysctl else ""
    out.append(_text(limit, top + 84, f"limit{raised}", size=11, fill="#b3261e", anchor="middle"))
    return out


def _notes(plan: Plan) -> list[str]:
    notes = [context_speeds(plan)] if context_speeds(plan) else []
    notes += [f"first, on {stage.machine}: {stage.sysctl}" for stage in plan.stages if stage.sysctl]
    return notes + ([f"left out: {', '.join(plan.left_out)}"] if plan.left_out else [])


def _footer(plan: Plan, notes: list[str], top: int) -> list[str]:
    made = plan.prediction
    text = (
        f"predicted {decode_speed(plan)}, first token after {made.ttft_s:.1f} s, "
        f"{plan.workload.prompt_tokens:,} in and {plan.workload.new_tokens:,} out in {made.request_s:.1f} s"
    )
    lines = [_text(MARGIN, top + 26, text, size=14, weight=600)]
    for index, note in enumerate(notes):
        lines.append(_text(MARGIN, top + 48 + LINE * index, note, size=12, fill="#5b6770"))
    return lines


def _text(
    x: float, y: float, text: str, *, size: int, fill: str = "#1d2429", weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str, tip: str = "", *, stroke: str = "") -> str:
    edge = f' stroke="{stroke}"' if stroke else ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{edge}>{title}</rect>'
