"""README.md of a pruned checkpoint: what is missing, by which measure, for what it is meant, and what that cost."""

from __future__ import annotations

from collections.abc import Iterator

from exo_kimi.arch.keys import EXPERTS_PER_LAYER
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.prune.plan import PLAN_NAME, PrunePlan
from exo_kimi.compress.prune.tensors import guessing_entries

CARD_NAME = "README.md"


def card_text(checkpoint: Checkpoint, plan: PrunePlan, notes: tuple[str, ...]) -> str:
    """The card.

    Args:
        checkpoint: the original.
        plan: what stays.
        notes: what it cost, as measured; without any, the card says that nothing was.
    """
    return "\n".join(_lines(checkpoint, plan, notes)) + "\n"


def _lines(checkpoint: Checkpoint, plan: PrunePlan, notes: tuple[str, ...]) -> Iterator[str]:
    config = checkpoint.config
    yield "---"
    yield "tags:"
    yield "- pruned"
    yield "- kimi"
    yield "---"
    yield ""
    yield f"# A pruned {config.model_type}: {plan.keep_text} of {plan.experts} experts"
    yield ""
    yield f"**Domain: {plan.domain or 'none: no text was looked at'}.** Outside of it, expect less."
    yield ""
    if plan.is_uniform:
        gone = (
            f"{plan.experts - plan.keep} of {plan.experts} routed experts of each of {len(plan.kept)} layers are gone"
        )
    else:
        gone = (
            f"{1 - plan.share:.0%} of the routed experts are gone; {plan.keep_text} of {plan.experts} stay in a layer "
            f"(`{EXPERTS_PER_LAYER}` in config.json: exo-kimi serves it, mlx-lm and exo's own engine do not)"
        )
    layers = f"; layers {', '.join(map(str, plan.dropped_layers))} are gone" if plan.dropped_layers else ""
    yield f"- {gone}{layers}. Ranked by {plan.criterion or 'nothing'}, {plan.source or 'all kept'}."
    if guesses := guessing_entries(checkpoint.index, plan):
        yield f"- Left out: the {len(guesses):,} tensors of the layers that guess further tokens (MTP)."
    yield "- What stays is the bytes of the original, nothing quantized anew. Router rows and correction biases follow their"
    chosen, factor = config.num_experts_per_tok, config.routed_scaling_factor
    yield f"  experts; shared ones, top-k ({chosen}) and scaling ({factor}) are as before."
    yield f"- Ids of the experts that stay: `{PLAN_NAME}`. Original: fingerprint `{checkpoint.fingerprint[:16]}`."
    yield ""
    yield "## What it cost"
    yield ""
    yield from (f"- {note}" for note in notes or ("not measured: `exo-kimi compare ORIGINAL THIS` does it",))
