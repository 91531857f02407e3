"""Decoding with a draft head beside decoding without: acceptance by position, tokens a step, bytes and time.

Three kinds of rows. `tiny Kimi`: the trained one with its own head, replies to held-out questions, three guesses in each step.
`toy`: a random model whose steps cost what K2's do, see `toy`. `K2`: the same policy by counted bytes, an M3 Ultra's launches
among them. Ratios are without / with, so 1.5 means a third less; where nothing can be guessed they are with / without.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from exo_kimi.bench.claims.drafts.setup import DraftedSetup
from exo_kimi.bench.claims.drafts.toy import ADVERSARIAL_BAR, by_position, in_words, toy_rows
from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.planner.command import model_bytes
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.planner.weights.draft import draft_bytes
from exo_kimi.runtime.engine.draft_policy import MOST_HEAD_DRAFTS, HeadPolicy, HeadState, lost_steps
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.steps import Proposal
from exo_kimi.train.evaluation.cases import question_cases

TINY_KIMI = Path(__file__).parents[3] / "data" / "tiny-kimi-k2"
TINY_HEAD = TINY_KIMI.with_name("tiny-kimi-k2-draft")
TINY_BAR = 2.0  # tokens a step at three guesses
K2_HEAD = "kimi-k2.6-mla"
ACCEPTANCES = (0.9, 0.64, 0.4, 0.0)
K2_TOKENS = 2000


def tiny_row(directory: Path, head: Path, *, count: int) -> Row:
    """The trained tiny Kimi with its head: tokens a step at three guesses, over held-out questions of every kind."""
    encoder = Encoder.from_directory(directory)
    prompts = [tuple(encoder.template.render([*case.messages]).ids) for case in question_cases(count, 1)]
    layers = Checkpoint(directory).config.num_hidden_layers
    setup = DraftedSetup(checkpoint=directory, bounds=(0, layers // 2, layers))
    sized = bytes_of_manifest(Checkpoint(directory).manifest())
    stop = frozenset(encoder.tokenizer.stop_ids)
    plain = setup.decode(prompts, None, stop=stop)
    drafter = Drafter.of("off", sized, head=HeadPolicy.of(3, draft_bytes=1.0))
    ours = replace(setup, head=head).decode(prompts, drafter, stop=stop)
    tokens = sum(map(len, ours.answers)) - len(prompts)
    steps = tokens - ours.snapshot.draft_tokens_accepted_total
    return Row(
        name=f"tiny Kimi, its head, {len(prompts)} held-out questions",
        ours=tokens / steps,
        theirs=1.0,
        unit="tokens a step",
        ratio=tokens / steps,
        bar=TINY_BAR,
        equal=ours.answers == plain.answers,
        note="right by position: " + by_position(ours.snapshot.head_drafts_by_position),
    )


def k2_costs(model: ModelBytes) -> tuple[float, list[float]]:
    """Bytes of a guess, and of steps of K2 with 0, 1 ... guesses and as many asked for, launches among them."""
    drafter = Drafter.of("off", model, head=HeadPolicy.of("auto", draft_bytes=1.0))
    if drafter is None:
        raise ValueError("a head makes a drafter")
    head = draft_bytes(K2_HEAD, model.config)
    each = head.step_bytes + (model.head_bytes if head.borrows_head else 0)
    return each, [
        drafter.step_bytes.cost(1 + count, sequences=1, cached_tokens=1000) + count * each
        for count in range(MOST_HEAD_DRAFTS + 1)
    ]


def k2_rows(model: ModelBytes) -> list[Row]:
    """The policy at K2's size by count: bytes a token with guesses against none."""
    each, costs = k2_costs(model)
    rows = []
    for chance in ACCEPTANCES:
        policy, state = HeadPolicy.of("auto", draft_bytes=each), HeadState()
        spent, done, steps, numbers = follow(policy, state, costs, chance=chance)
        kept = max(set(numbers), key=numbers.count)
        ratio = costs[0] * done / spent
        rows.append(
            Row(
                name=f"K2 by count, acceptance {chance:g}",
                ours=spent / done,
                theirs=costs[0],
                unit="bytes",
                ratio=ratio if chance else 1 / ratio,
                bar=None if chance else ADVERSARIAL_BAR,
                direction="at least" if chance else "at most",
                note=f"{done / steps:.2f} tokens a step, mostly {kept} guesses; pays from {break_even(costs)}",
            )
        )
    return rows


def follow(
    policy: HeadPolicy, state: HeadState, costs: Sequence[float], *, chance: float
) -> tuple[float, int, int, list[int]]:
    """Decode a text of which each guess is right by a chance. Returns bytes, tokens, steps and the numbers of guesses."""
    draw, spent, done, waiting, numbers = np.random.default_rng(0), 0.0, 0, 0, list[int]()
    while done < K2_TOKENS:
        wanted = policy.choose(state, most=MOST_HEAD_DRAFTS, costs=costs, others=0.0)
        accepted = 0
        while accepted < wanted and draw.random() < chance:
            accepted += 1
        if wanted:
            policy.on_verified(state, drafts=wanted, accepted=accepted)
        elif (waiting := (waiting + 1) % 16) == 0:
            right = int((draw.random(15) < chance).sum())
            policy.on_proposal(state, Proposal(seq_id=0, judged=15, right=right))
            spent += policy.draft_bytes
        policy.on_step(state, won=accepted, lost=lost_steps(costs, wanted, 0.0))
        spent += costs[wanted]
        done, numbers = done + 1 + accepted, [*numbers, wanted]
    return spent, done, len(numbers), numbers


def break_even(costs: Sequence[float]) -> str:
    """From how many tokens a step each number of guesses pays."""
    found = [costs[count] / costs[0] for count in range(1, 4)]
    return ", ".join(f"{tokens:.2f} (k={count})" for count, tokens in enumerate(found, start=1)) + " tokens a step"


def run(*, head: Path | None, rounds: int, count: int, published: str, recipe: str) -> Result:
    """All rows."""
    head = head or (TINY_HEAD if TINY_HEAD.is_dir() else None)
    notes = [f"K2: {published}, {recipe}, head {K2_HEAD}; on M3 Ultra's launches and bandwidth"]
    rows: list[Row] = []
    if head is None:
        notes.append("no trained head is here: `exo-kimi train draft` makes one, and --draft takes it")
    else:
        rows.append(tiny_row(TINY_KIMI, head, count=count))
    with tempfile.TemporaryDirectory() as folder:
        toys, laws = toy_rows(Path(folder), rounds=rounds)
    rows += toys
    notes += laws
    model = model_bytes(model=published, recipe=recipe)
    costs = k2_costs(model)[1]
    notes.append(f"K2 by count: such a step takes {in_words([cost / costs[0] for cost in costs])} of a plain one")
    rows += k2_rows(model)
    return Result(bench="drafts", against="the same engine without a head", rows=rows, notes=notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench drafts", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--draft", type=Path, help="a head of the tiny Kimi (default: the one that comes with it)")
    parser.add_argument("--rounds", type=int, default=6, help="of the toy (default 6)")
    parser.add_argument("--count", type=int, default=2, help="questions of each kind for the tiny Kimi (default 2)")
    parser.add_argument(
        "--model", default="kimi-k2-instruct", help="whose bytes are counted (default kimi-k2-instruct)"
    )
    parser.add_argument("--recipe", default="q34+q6", help="at these bits (default q34+q6)")
    given = parser.parse_args(arguments)
    result = run(head=given.draft, rounds=given.rounds, count=given.count, published=given.model, recipe=given.recipe)
    return finish(result, given)
