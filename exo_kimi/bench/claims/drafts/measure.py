"""Decoding with a draft head beside decoding without: acceptance by position, tokens a step, bytes and time.

Three kinds of rows. `tiny Kimi`: the trained one with its own head, replies to held-out questions, three guesses in each step.
`toy`: a random model of more work, whose head guesses right by a chance that is given, one stream on one stage and on two:
seconds a token with the policy's numbers of guesses, against none. `K2`: the same policy by counted bytes, an M3 Ultra's
launches among them. Ratios are without / with, so 1.5 means a third less; where nothing can be guessed they are with / without.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from exo_kimi.bench.claims.drafts.scripted_head import ScriptedHead
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.planner.command import model_bytes
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.planner.weights.draft import draft_bytes
from exo_kimi.runtime.engine.draft_policy import MOST_HEAD_DRAFTS, HeadPolicy, HeadState, guess_bytes, lost_steps
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.drafting import DraftRunner
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.steps import Proposal
from exo_kimi.train.evaluation.cases import question_cases

TINY_KIMI = Path(__file__).parents[3] / "data" / "tiny-kimi-k2"
TINY_HEAD = TINY_KIMI.with_name("tiny-kimi-k2-draft")
TINY_BAR = 2.0  # tokens a step at three guesses
GUESSED_BAR = 1.3  # at the tiny head's acceptance
ADVERSARIAL_BAR = 1.03
TINY_ACCEPTANCE = 0.97
NEW = 96
TOY_NEW = 96
TOY = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 6,
}
"""Plain float32 weights, most of them shared by all tokens of a step: on a CPU too, their bytes are what a step takes."""
K2_HEAD = "kimi-k2.6-mla"
ACCEPTANCES = (0.9, 0.64, 0.4, 0.0)
K2_TOKENS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedAnswers:
    """Answers, and the time from the first token of the last one to its end."""

    answers: tuple[tuple[int, ...], ...]
    decode_s: float
    snapshot: EngineSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedSetup:
    """A checkpoint, split, with a head or without.

    Args:
        checkpoint: of the model.
        bounds: of the stages.
        head: of its directory; None for none.
        script: what the head guesses, see `ScriptedHead`; None for its own guesses.
        chance: see `ScriptedHead`.
    """

    checkpoint: Path
    bounds: tuple[int, ...]
    head: Path | None = None
    script: tuple[int, ...] | None = None
    chance: float = 1.0

    def pipeline(self) -> InlinePipeline:
        """All stages in one thread."""
        layers = () if self.head is None else resolve_draft(self.head).config.feature_layers(self.bounds[-1])

        def stages() -> Sequence[StageModel]:
            return [load(self.checkpoint, a, b, dtype="float32", fuse=True) for a, b in pairwise(self.bounds)]

        def drafts(model: StageModel) -> DraftRunner:
            if self.head is None:
                raise ValueError("no head to load")
            head = load_draft_head(self.head, Checkpoint(self.checkpoint), dtype="float32")
            vocab_size = model.args.vocab_size
            if self.script is None:
                return DraftRunner(head, vocab_size=vocab_size)
            return DraftRunner(ScriptedHead(head, self.script, chance=self.chance), vocab_size=vocab_size)

        return InlinePipeline(
            stages,
            stages=len(self.bounds) - 1,
            context=4096,
            kv_capacity_tokens=16384,
            cache_step=256,
            feature_layers=layers,
            load_drafts=drafts if layers else None,
        )

    def decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        drafter: Drafter | None,
        *,
        stop: frozenset[int] = frozenset(),
        new: int = NEW,
    ) -> TimedAnswers:
        """Answer prompts one after the other, greedily."""

        async def run() -> TimedAnswers:
            answers, begun_s = [], 0.0
            async with Engine(self.pipeline(), drafter=drafter, prefill_chunk=512) as engine:
                for index, prompt in enumerate(prompts):
                    request = GenerationRequest(
                        request_id=str(index),
                        prompt_ids=prompt,
                        max_tokens=new,
                        sampling=SamplingParams(temperature=0.0),
                        stop_ids=stop,
                    )
                    answer: list[int] = []
                    async with aclosing(engine.generate(request)) as events:
                        async for event in events:
                            begun_s = begun_s if answer else time.perf_counter()
                            answer.append(event.token_id)
                    answers.append(tuple(answer))
                taken_s = time.perf_counter() - begun_s
                return TimedAnswers(answers=tuple(answers), decode_s=taken_s, snapshot=engine.snapshot())

        return asyncio.run(run())


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
        note="right by position: " + by_position(ours.snapshot),
    )


def by_position(snapshot: EngineSnapshot) -> str:
    """Shares of guesses that were right, those before them having been."""
    return ", ".join(f"{hits / tries:.2f}" for tries, hits in snapshot.head_drafts_by_position if tries) or "none sent"


def toy_rows(folder: Path, *, rounds: int) -> list[Row]:
    """Seconds a token of the toy, with the numbers of guesses that the policy chooses by counted bytes."""
    checkpoint = make_tiny(folder / "toy", recipe="plain", dtype="F32", seed=1, config=TOY, template=None)
    config = Checkpoint(checkpoint).config
    head = make_tiny_draft(folder / "head", config, dtype="F32")
    sized = bytes_of_manifest(Checkpoint(checkpoint).manifest())
    draft = guess_bytes(resolve_draft(head), sized.head_bytes)
    prompt = tuple(np.random.default_rng(0).integers(0, 500, 32).tolist())
    rows = []
    for bounds in ((0, 8), (0, 5, 8)):
        plain = DraftedSetup(checkpoint=checkpoint, bounds=bounds)
        (answer,) = plain.decode([prompt], None, new=TOY_NEW).answers
        for chance in (TINY_ACCEPTANCE, 0.0):
            setup = replace(plain, head=head, script=(*prompt, *answer), chance=chance)

            def ours(setup: DraftedSetup = setup) -> TimedAnswers:
                drafter = Drafter.of("off", sized, head=HeadPolicy.of("auto", draft_bytes=draft))
                return setup.decode([prompt], drafter, new=TOY_NEW)

            def theirs(setup: DraftedSetup = plain) -> TimedAnswers:
                return setup.decode([prompt], None, new=TOY_NEW)

            pairs = taken_in_turn(ours, theirs, rounds=rounds)
            last = pairs[-1][0]
            drafted = last.snapshot.draft_tokens_total
            rows.append(
                Row.of_pairs(
                    f"toy, {len(bounds) - 1} stages, acceptance {chance:g}",
                    [(one.decode_s / (TOY_NEW - 1), other.decode_s / (TOY_NEW - 1)) for one, other in pairs],
                    unit="s",
                    bar=GUESSED_BAR if chance else ADVERSARIAL_BAR,
                    direction="at least" if chance else "at most",
                    inverse=not chance,
                    note=f"right by position: {by_position(last.snapshot)}; {drafted} guesses sent",
                    equal=all(one.answers == other.answers == (answer,) for one, other in pairs),
                )
            )
    return rows


def k2_rows(model: ModelBytes) -> list[Row]:
    """The policy at K2's size by count: bytes a token with guesses, launches and the head's own among them, against none."""
    drafter = Drafter.of("off", model, head=HeadPolicy.of("auto", draft_bytes=1.0))
    if drafter is None:
        raise ValueError("a head makes a drafter")
    head = draft_bytes(K2_HEAD, model.config)
    each = head.step_bytes + (model.head_bytes if head.borrows_head else 0)
    costs = [
        drafter.step_bytes.cost(1 + count, sequences=1, cached_tokens=1000) + count * each
        for count in range(MOST_HEAD_DRAFTS + 1)
    ]
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
        rows += toy_rows(Path(folder), rounds=rounds)
    rows += k2_rows(model_bytes(model=published, recipe=recipe))
    return Result(bench="drafts", against="the same engine without a head", rows=rows, notes=notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench drafts", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--draft", type=Path, help="a head of the tiny Kimi (default: the one that comes with it)")
    parser.add_argument("--rounds", type=int, default=2, help="of the toy (default 2)")
    parser.add_argument("--count", type=int, default=2, help="questions of each kind for the tiny Kimi (default 2)")
    parser.add_argument(
        "--model", default="kimi-k2-instruct", help="whose bytes are counted (default kimi-k2-instruct)"
    )
    parser.add_argument("--recipe", default="q34+q6", help="at these bits (default q34+q6)")
    given = parser.parse_args(arguments)
    result = run(head=given.draft, rounds=given.rounds, count=given.count, published=given.model, recipe=given.recipe)
    return finish(result, given)
