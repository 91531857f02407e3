"""All outcomes as one self-contained HTML page: machine, bars met, a table of ratios, and plots where they can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from exo_kimi.bench import plots
from exo_kimi.bench.frame import Row, figure
from exo_kimi.bench.outcome import BenchOutcome
from exo_kimi.bench.surroundings import Surroundings

NO_PLOTS = 'Plots need matplotlib: pip install "exo-kimi[report]"'

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #64748b; --line: #e3e7ee; --good: #15803d; --bad: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.25rem 5rem; background: #f6f7f9; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.02em; }
h2 { margin: 0 0 .2rem; font-size: 1.1rem; }
p { margin: .3rem 0; color: var(--soft); }
section, header { margin-bottom: 1.25rem; padding: 1.25rem 1.4rem; background: #fff; border: 1px solid var(--line);
  border-radius: 12px; overflow-x: auto; }
header { display: grid; gap: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { padding: .35rem .6rem; color: var(--soft); font-weight: 500; text-align: left; white-space: nowrap; }
td { padding: .35rem .6rem; border-top: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; }
.ok { color: var(--good); font-weight: 600; }
.missed { color: var(--bad); font-weight: 600; }
.count { font-size: 1.15rem; }
svg { display: block; width: 100%; height: auto; margin-top: .6rem; }
pre { margin: .6rem 0 0; padding: .8rem; background: #f6f7f9; border-radius: 8px; font-size: .8rem; white-space: pre-wrap; }
a { color: inherit; }
"""


def page(outcomes: Sequence[BenchOutcome], surroundings: Surroundings) -> str:
    """The page. Without matplotlib it has every figure and says what the plots need."""
    drawn = plots.available()
    body = [
        _header(outcomes, surroundings),
        "" if drawn else f"<section><p>{escape(NO_PLOTS)}</p></section>",
        _section("every", "Every claim", plots.overview(outcomes) if drawn else "", _table(outcomes)),
        *(_bench(outcome, drawn) for outcome in outcomes),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>exo-kimi measured</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *(part for part in body if part),
            "</body>\n</html>\n",
        ]
    )


def _header(outcomes: Sequence[BenchOutcome], surroundings: Surroundings) -> str:
    claims = [row for outcome in outcomes for row in outcome.rows if row.bar is not None]
    met = sum(row.ok for row in claims)
    failed = [outcome.bench for outcome in outcomes if outcome.problem]
    skipped = [outcome.bench for outcome in outcomes if outcome.skipped]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in surroundings.facts().items())
    tone = "ok" if met == len(claims) and not failed else "missed"
    says = [f'<span class="{tone}">{met} of {len(claims)} bars met</span>']
    says += [f"failed: {escape(', '.join(failed))}"] if failed else []
    says += [f"skipped: {escape(', '.join(skipped))}"] if skipped else []
    return (
        "<header>\n<h1>exo-kimi, measured side by side</h1>\n"
        f'<p class="count">{"; ".join(says)}</p>\n'
        "<p>Each ratio is a median over runs taken in turn on the same weights, outputs compared in the same run.</p>\n"
        f"<dl>{facts}</dl>\n</header>"
    )


def _bench(outcome: BenchOutcome, drawn: bool) -> str:
    title = f"{outcome.bench}, against {outcome.against}" if outcome.against else outcome.bench
    if outcome.skipped:
        return _section(outcome.bench, title, f"<p>skipped: {escape(outcome.skipped)}</p>")
    if outcome.problem:
        lines = escape(outcome.problem.replace(" | ", "\n"))
        return _section(outcome.bench, title, f'<p class="missed">failed</p><pre>{lines}</pre>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in outcome.notes)
    row_notes = "".join(f"<p>{escape(f'{row.name}: {row.note}')}</p>" for row in outcome.rows if row.note)
    command = f"<p><code>exo-kimi bench {escape(outcome.words)}</code>, {outcome.seconds:.0f} s</p>"
    plot = plots.of_bench(outcome) if drawn else _table([outcome])
    return _section(outcome.bench, title, command, plot, row_notes, notes)


def _section(anchor: str, title: str, *parts: str) -> str:
    return (
        f'<section id="{escape(anchor)}">\n<h2>{escape(title)}</h2>\n' + "\n".join(filter(None, parts)) + "\n</section>"
    )


def _table(outcomes: Sequence[BenchOutcome]) -> str:
    head = '<tr><th>bench</th><th>claim</th><th class="n">ours</th><th class="n">theirs</th><th class="n">ratio</th>'
    head += '<th class="n">quartiles</th><th class="n">bar</th><th></th></tr>'
    lines = [line for outcome in outcomes for line in _lines(outcome)]
    return "<table>\n" + "\n".join([head, *lines]) + "\n</table>"


def _lines(outcome: BenchOutcome) -> list[str]:
    name = f'<td><a href="#{escape(outcome.bench)}">{escape(outcome.bench)}</a></td>'
    if outcome.skipped or outcome.problem:
        verdict = "<td>skipped</td>" if outcome.skipped else '<td class="missed">failed</td>'
        return [
            f'<tr>{name}<td colspan="6">{escape((outcome.skipped or outcome.problem or "")[:160])}</td>{verdict}</tr>'
        ]
    return [f"<tr>{name}{_cells(row)}</tr>" for row in outcome.rows]


def _cells(row: Row) -> str:
    spread = "" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"
    numbers = (
        figure(row.ours, row.unit),
        "" if row.theirs is None else figure(row.theirs, row.unit),
        f"{row.ratio:.3g}",
        spread,
        "" if row.bar is None else f"{row.direction} {row.bar:.3g}",
    )
    verdict = ""
    if row.bar is not None or row.equal is not None:
        verdict = f'<span class="{"ok" if row.ok else "missed"}">{"ok" if row.ok else "missed"}</span>'
        verdict += {True: ", outputs equal", False: ", outputs differ", None: ""}[row.equal]
    cells = "".join(f'<td class="n">{escape(number)}</td>' for number in numbers)
    return f"<td>{escape(row.name)}</td>{cells}<td>{verdict}</td>"
