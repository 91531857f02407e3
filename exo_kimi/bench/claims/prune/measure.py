"""What pruning the shipped tiny Kimi costs, by every score of experts: KL and right answers, with intervals.

    exo-kimi bench prune

A plan is tried as its mask: original experts behind the pruned router, which is bit for bit what `prune` writes. Scores are
measured on training conversations, KL and answers on held-out ones; protection of super experts is off, so that chance is
chance. Ratios are KL over the median of random plans'; the last row's over weight norm's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import exo_kimi
from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.calibrate.calibrate import Calibration, calibrate
from exo_kimi.compress.calibrate.measures import Measured
from exo_kimi.compress.calibrate.scores import CRITERIA, Criterion
from exo_kimi.compress.compare.intervals import Estimate, mean_of_texts
from exo_kimi.compress.compare.replies import ModelReplier
from exo_kimi.compress.compare.score import Score, score
from exo_kimi.compress.compare.walks import WalkedTexts, pairs_of, walk_texts
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.prune.mask import mask, masking
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.prune.prune import PruneWish, make_plan
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.data.conversations import training_conversation
from exo_kimi.train.evaluation.cases import Case, question_cases
from exo_kimi.train.evaluation.evaluate import held_out_texts

TINY = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"
HALF_OF_NORM = 0.5
SEED = 7
REPLY_TOKENS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSizes:
    """How much is looked at.

    Args:
        texts: conversations that scores are measured on.
        held_out: texts that KL is measured on.
        seeds: random plans.
        questions: of each task, asked of every plan; 0 asks none.
        criteria: scores that are tried, beside chance; leave-one-out among them.
        keep: experts that stay.
        budgeted: also leave-one-out's experts divided over the layers.
    """

    texts: int = 300
    held_out: int = 60
    seeds: int = 6
    questions: int = 2
    criteria: tuple[Criterion, ...] = tuple(criterion for criterion in CRITERIA if criterion != "random")
    keep: tuple[int, ...] = (12, 8)
    budgeted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneCost:
    """What one plan costs: KL in nats a token, and questions answered right."""

    kl: Estimate
    right: Score


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench prune", description="what pruning the tiny Kimi costs")
    sizes = PruneSizes()
    parser.add_argument("--texts", type=int, default=sizes.texts, help="calibration conversations (default 300)")
    parser.add_argument("--held-out", type=int, default=sizes.held_out, help="texts of the KL (default 60)")
    parser.add_argument("--seeds", type=int, default=sizes.seeds, help="random plans (default 6)")
    parser.add_argument("--questions", type=int, default=sizes.questions, help="of each task, of each plan (default 2)")
    options = parser.parse_args(argv)
    return finish(
        measure(
            PruneSizes(texts=options.texts, held_out=options.held_out, seeds=options.seeds, questions=options.questions)
        ),
        options,
    )


def measure(sizes: PruneSizes) -> Result:
    """All rows: each score with 12 and 8 of 16 experts kept."""
    encoder, checkpoint = Encoder.from_directory(TINY), Checkpoint(TINY)
    rng = Random("calibration")
    texts = [encoder.encode(training_conversation(rng)) for _ in range(sizes.texts)]
    measured = calibrate(Calibration(walk=LayerWalk(checkpoint=checkpoint, dtype="float32"), texts=texts))
    trial = _Trial(checkpoint, encoder, held_out_texts(encoder, sizes.held_out, SEED), sizes.questions)
    whole = trial.answers(None)
    rows = [row for keep in sizes.keep for row in _rows(trial, measured, keep, sizes)]
    tokens = sum(len(text.ids) for text in texts)
    return Result(
        bench="prune",
        against="random plans of the same size",
        rows=rows,
        notes=[
            f"scores from {len(texts)} conversations ({tokens:,} tokens), KL over {len(trial.texts)} held-out texts, "
            "95 % intervals over texts",
            f"the whole model: {_answers(whole)}",
        ],
    )


class _Trial:
    """The original, and what a plan's mask makes of it."""

    def __init__(self, checkpoint: Checkpoint, encoder: Encoder, texts: list[Encoded], questions: int) -> None:
        self.checkpoint, self.texts = checkpoint, texts
        self._encoder = encoder
        self._cases: list[Case] = question_cases(questions, SEED) if questions else []
        self._original: WalkedTexts = walk_texts(LayerWalk(checkpoint=checkpoint, dtype="float32"), texts)

    def cost(self, plan: PrunePlan) -> PruneCost:
        walk = LayerWalk(checkpoint=self.checkpoint, dtype="float32", change=masking(plan, self.checkpoint.config))
        pairs = pairs_of(self._original, walk_texts(walk, self.texts), self.texts)
        return PruneCost(kl=mean_of_texts(pairs.kl, pairs.text_of), right=self.answers(plan))

    def answers(self, plan: PrunePlan | None) -> Score:
        if not self._cases:
            return score([])
        model = load(self.checkpoint.directory, dtype="float32")
        if plan is not None:
            mask(model, plan)
        replier = ModelReplier(
            model=model,
            tokenizer=self._encoder.tokenizer,
            template=self._encoder.template,
            max_tokens=REPLY_TOKENS,
        )
        replies = replier.answer([(case.messages, None) for case in self._cases])
        return score([reply.content in case.accepted for case, reply in zip(self._cases, replies, strict=True)])


def _rows(trial: _Trial, measured: Measured, keep: int, sizes: PruneSizes) -> Iterator[Row]:
    wish = PruneWish(keep=keep, measured=measured, protect=False)

    def cost(wish: PruneWish) -> PruneCost:
        return trial.cost(make_plan(trial.checkpoint, wish))

    chances = [cost(replace(wish, criterion="random", seed=seed)) for seed in range(sizes.seeds)]
    chance = median(each.kl.value for each in chances)
    spread = f"{min(each.kl.value for each in chances):.3f} to {max(each.kl.value for each in chances):.3f}"
    rights = sorted((each.right for each in chances), key=lambda each: each.right)
    label = f"{keep} of {trial.checkpoint.config.n_routed_experts}"
    found = {criterion: cost(replace(wish, criterion=criterion)) for criterion in sizes.criteria}
    for criterion, each in found.items():
        yield _row(f"{criterion}, {label}", each, chance, bar=1.0 if criterion == "leave-one-out" else None)
    if sizes.budgeted:
        yield _row(f"leave-one-out --budgeted, {label}", cost(replace(wish, budgeted=True)), chance)
    yield Row(
        name=f"random x{sizes.seeds}, {label}",
        ours=chance,
        unit="nats",
        ratio=1.0,
        note=f"median; {spread}" + (f"; {_answers(rights[len(rights) // 2])}" if rights[0].count else ""),
    )
    if keep == min(sizes.keep) and "weight-norm" in found:
        best, norm = found["leave-one-out"].kl.value, found["weight-norm"].kl.value
        yield Row(
            name=f"leave-one-out over weight-norm, {label}",
            ours=best,
            theirs=norm,
            unit="nats",
            ratio=best / norm,
            bar=HALF_OF_NORM,
            direction="at most",
        )


def _row(name: str, cost: PruneCost, chance: float, *, bar: float | None = None) -> Row:
    words = [f"{cost.kl.low:.3f} to {cost.kl.high:.3f}", *([_answers(cost.right)] if cost.right.count else [])]
    return Row(
        name=name,
        ours=cost.kl.value,
        theirs=chance,
        unit="nats",
        ratio=cost.kl.value / chance,
        bar=bar,
        direction="at most",
        note="; ".join(words),
    )


def _answers(right: Score) -> str:
    low, high = right.interval
    return f"{right.right} of {right.count} questions right ({low:.0%} to {high:.0%})"
