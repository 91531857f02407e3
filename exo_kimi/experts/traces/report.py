"""Replays as a table, as a plot, and as hit rates for the planner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from exo_kimi.errors import UsageError
from exo_kimi.experts.policies import DEFAULT_POLICY, POLICY_NAMES
from exo_kimi.experts.traces.replay import Replay, che, replay
from exo_kimi.experts.traces.trace import ExpertTrace

BELADY = "belady"
EVERY_POLICY = (*POLICY_NAMES, BELADY)
CURVE_VERSION = 1
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of a layer's experts, as slots, where nobody says which."""

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 440, 64, 48, 150, 56
_COLORS = {
    "lru": "#2f5d8a",
    "slru": "#3f9b8f",
    "lfu": "#c26a4a",
    "s3fifo": "#8a5fa8",
    "pinned": "#e0a63c",
    BELADY: "#1d2429",
}
_FONT = "font-family=\"-apple-system, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif\""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayTable:
    """A trace through several policies and numbers of slots.

    Args:
        trace: what was replayed.
        slots: of a layer, ascending.
        replays: of each policy, in the order of `slots`.
        theory: hit rate by Che's approximation, in the same order.
    """

    trace: ExpertTrace
    slots: tuple[int, ...]
    replays: dict[str, tuple[Replay, ...]]
    theory: tuple[float, ...]

    @classmethod
    def of(
        cls,
        trace: ExpertTrace,
        *,
        slots: Sequence[int] = (),
        policies: Sequence[str] = EVERY_POLICY,
        learnt: ExpertTrace | None = None,
    ) -> ReplayTable:
        """Replay a trace.

        Args:
            trace: what is asked for.
            slots: numbers of slots; some shares of the experts when not given.
            policies: names, `belady` among them if wanted.
            learnt: whose most used experts `pinned` keeps.

        Raises:
            UsageError: more slots than experts, or what `replay` refuses.
        """
        sizes = sorted(set(slots)) or sorted({max(trace.chosen, round(share * trace.experts)) for share in SHARES})
        if sizes[-1] > trace.experts:
            raise UsageError(
                "more slots than experts", expected=f"at most {trace.experts}", found=sizes[-1], where="--slots"
            )
        return cls(
            trace=trace,
            slots=tuple(sizes),
            replays={name: tuple(replay(trace, name, size, learnt=learnt) for size in sizes) for name in policies},
            theory=tuple(che(trace, size) for size in sizes),
        )

    def to_text(self) -> str:
        """Hit rates, a row for each number of slots."""
        trace = self.trace
        passes = "one at a time" if len(trace.calls) == trace.tokens else f"in {len(trace.calls)} passes"
        lines = [
            f"{trace.source or 'a trace'}: {trace.tokens} tokens {passes}, {len(trace.layers)} layers, "
            f"{trace.chosen} of {trace.experts} experts a token; {trace.overlap():.0%} of a token's are of the one before it "
            f"(chance {trace.chosen / trace.experts:.0%})",
            "",
            f"{'slots':>6} {'share':>6} " + " ".join(f"{name:>7}" for name in self.replays) + f" {'che':>7}",
        ]
        for row, size in enumerate(self.slots):
            rates = " ".join(f"{made[row].hit_rate:7.3f}" for made in self.replays.values())
            lines.append(f"{size:>6} {size / trace.experts:6.3f} {rates} {self.theory[row]:7.3f}")
        lines += [
            "",
            "hit rates: experts that have a slot of those asked for, each once a pass; belady knows the future,",
        ]
        lines += ["che is what least recently used would reach if every token chose for itself."]
        return "\n".join(lines)

    def to_json(self) -> str:
        """One line: what was counted."""
        counted = {
            name: [{"slots": made.slots, "hits": made.hits, "misses": made.misses} for made in row]
            for name, row in self.replays.items()
        }
        found = {"trace": self.trace.source, "tokens": self.trace.tokens, "experts": self.trace.experts}
        return json.dumps({**found, "chosen": self.trace.chosen, "policies": counted}, sort_keys=True)

    def curve(self, policy: str = DEFAULT_POLICY) -> str:
        """Hit rates for `exo-kimi plan --hits`: the whole trace, and the least and the greatest of its quarters.

        Raises:
            UsageError: the policy was not replayed.
        """
        if policy not in self.replays:
            raise UsageError(
                "hit rates of a policy that was not replayed", expected=", ".join(self.replays), found=policy
            )
        made = self.replays[policy]
        rates = {
            "low": [min(each.hit_rate, *each.parts) for each in made],
            "hits": [each.hit_rate for each in made],
            "high": [max(each.hit_rate, *each.parts) for each in made],
        }
        lines = [
            f"version = {CURVE_VERSION}",
            f"source = {json.dumps(self.trace.source or 'a trace', ensure_ascii=False)}",
            f'policy = "{policy}"',
            f"experts = {self.trace.experts}",
            f"chosen = {self.trace.chosen}",
            f"tokens = {self.trace.tokens}",
            f"slots = {list(self.slots)}",
            *(f"{key} = [{', '.join(f'{rate:.4f}' for rate in row)}]" for key, row in rates.items()),
        ]
        return "\n".join(lines) + "\n"

    def svg(self) -> str:
        """Hit rates over the share of experts that have a slot, a line for each policy; the same text for the same table."""
        wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        experts = self.trace.experts

        def at(share: float, rate: float) -> str:
            return f"{_LEFT + share * wide:.1f},{_TOP + (1 - rate) * high:.1f}"

        body = [
            _text(_LEFT, 28, f"{self.trace.source or 'a trace'}: hit rate by slots and policy", size=15, weight=600)
        ]
        for step in range(0, 101, 25):
            share = step / 100
            (x, y), (x0, y0) = at(share, share).split(","), at(0, 0).split(",")
            x1, y1 = at(1, 1).split(",")
            body.append(f'<path d="M{x0},{y}H{x1}M{x},{y0}V{y1}" stroke="#e3e8ec" fill="none"/>')
            body.append(_text(_LEFT - 8, float(y) + 4, f"{share:.2f}", anchor="end"))
            body.append(_text(float(x), _HEIGHT - _BOTTOM + 20, f"{step} %", anchor="middle"))
        body.append(f'<path d="M{at(0, 0)}L{at(1, 1)}" stroke="#9aa5ad" stroke-dasharray="4 4" fill="none"/>')
        for number, (name, made) in enumerate(self.replays.items()):
            points = " ".join(at(each.slots / experts, each.hit_rate) for each in made)
            color = _COLORS.get(name, "#5b6770")
            body.append(
                f'<polyline points="{points}" stroke="{color}" stroke-width="2" fill="none"><title>{name}</title></polyline>'
            )
            top = _TOP + 16 + 20 * number
            body.append(f'<path d="M{_WIDTH - _RIGHT + 16},{top - 4}h20" stroke="{color}" stroke-width="3"/>')
            body.append(_text(_WIDTH - _RIGHT + 44, top, name))
        top = _TOP + 16 + 20 * len(self.replays)
        body.append(f'<path d="M{_WIDTH - _RIGHT + 16},{top - 4}h20" stroke="#9aa5ad" stroke-dasharray="4 4"/>')
        body.append(_text(_WIDTH - _RIGHT + 44, top, "chance"))
        under = f"experts that have a slot, of {experts} ({self.trace.chosen} a token)"
        body.append(_text(_LEFT + wide / 2, _HEIGHT - 14, under, anchor="middle"))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        title = f"<title>{escape(self.trace.source or 'a trace')}</title>"
        return "\n".join(
            [
                head + f'role="img" {_FONT}>',
                title,
                f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
                *body,
                "</svg>",
                "",
            ]
        )


def _text(x: float, y: float, text: str, *, size: int = 12, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="#1d2429" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
