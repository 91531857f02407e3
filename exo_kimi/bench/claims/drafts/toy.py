"""A random model whose steps cost what K2's do, with a head that guesses right by a chance: what guessing gains and loses.

On a Mac a step of K2 is launches and bytes: one with three guesses takes 2.15 times a plain step by count. A CPU's step is
arithmetic, and with large matrices four rows take four times one row (MLX's Linux wheels carry the reference BLAS). So this model
is narrow and deep: most of a step is handing out its operations, which are as many for one row as for seven, and what further
rows add is near to what further experts add to K2's step. Both laws stand in the notes, timed and counted.

Seconds are the processor's, of the whole process, for the policy too: what else runs on the machine does not count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from exo_kimi.bench.claims.drafts.setup import DraftedSetup
from exo_kimi.bench.frame import Row
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.runtime.engine.draft_policy import HeadPolicy, guess_bytes
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams

GUESSED_BAR = 1.3  # at the tiny head's acceptance
PREDICTED_BAR = 0.9
ADVERSARIAL_BAR = 1.03
TINY_ACCEPTANCE = 0.97
NEW = 64
LAYERS = 24
TOY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
SPLITS = ((0, LAYERS), (0, 2 * LAYERS // 3, LAYERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """The model, its head, a prompt and its answer.

    Args:
        checkpoint, head: their directories.
        sized: bytes of the model.
        draft_bytes: of a guess.
        prompt: token ids.
        answer: that follows it.
    """

    checkpoint: Path
    head: Path
    sized: ModelBytes
    draft_bytes: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def made(cls, folder: Path) -> Toy:
        """Of random weights; its answer is what it says without a head."""
        checkpoint = make_tiny(folder / "toy", recipe="plain", dtype="F32", seed=1, config=TOY, template=None)
        head = make_tiny_draft(folder / "head", Checkpoint(checkpoint).config, dtype="F32")
        sized = bytes_of_manifest(Checkpoint(checkpoint).manifest())
        prompt = tuple(np.random.default_rng(0).integers(0, 500, 32).tolist())
        plain = DraftedSetup(checkpoint=checkpoint, bounds=(0, LAYERS))
        (answer,) = plain.decode([prompt], None, new=NEW).answers
        draft = guess_bytes(resolve_draft(head), sized.head_bytes)
        return cls(checkpoint=checkpoint, head=head, sized=sized, draft_bytes=draft, prompt=prompt, answer=answer)

    def setup(self, bounds: tuple[int, ...], chance: float | None) -> DraftedSetup:
        """Split so, with a head that is right by a chance, or without."""
        setup = DraftedSetup(checkpoint=self.checkpoint, bounds=bounds)
        if chance is None:
            return setup
        return replace(setup, head=self.head, script=(*self.prompt, *self.answer), chance=chance)

    def policy(self) -> HeadPolicy:
        """That knows nothing yet."""
        return HeadPolicy.of("auto", draft_bytes=self.draft_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One of the engines that take turns.

    Args:
        engine: open, without requests.
        policy: of its head; None without one.
    """

    engine: Engine
    policy: HeadPolicy | None = None

    async def decode(self, toy: Toy) -> float:
        """Processor seconds from the first token of the answer to its end.

        Raises:
            ValueError: the answer is another.
        """
        request = GenerationRequest(
            request_id="toy", prompt_ids=toy.prompt, max_tokens=NEW, sampling=SamplingParams(temperature=0.0)
        )
        answer, begun_s = list[int](), 0.0
        async with aclosing(self.engine.generate(request)) as events:
            async for event in events:
                begun_s = begun_s if answer else time.process_time()
                answer.append(event.token_id)
        taken_s = time.process_time() - begun_s
        if tuple(answer) != toy.answer:
            raise ValueError(f"another answer: {answer[:8]} ...")
        return taken_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What the engines took.

    Args:
        plain_s, guessed_s, adverse_s: of each round, without a head, with one that is mostly right, and with one that never is.
        predicted: how many times as fast as plain the policy of the second expected to be.
        by_position: shares of its guesses that were right.
        law: steps with 0, 1 ... guesses, as it timed them, over a plain one.
        adverse_guesses: that the third sent.
    """

    plain_s: list[float]
    guessed_s: list[float]
    adverse_s: list[float]
    predicted: float
    by_position: str
    law: list[float]
    adverse_guesses: int


async def take_turns(toy: Toy, bounds: tuple[int, ...], *, rounds: int) -> Turns:
    """A plain engine, one whose head is right as the tiny Kimi's, and one whose head is never right, a reply each in turn.

    The first round warms all up and teaches the policy of the second one; that of the third begins anew, as its losses are what
    learning costs.
    """
    chances = (None, TINY_ACCEPTANCE, 0.0)
    async with AsyncExitStack() as stack:
        contenders = []
        for chance in chances:
            policy = None if chance is None else toy.policy()
            drafter = None if policy is None else Drafter.of("off", toy.sized, head=policy)
            pipeline = toy.setup(bounds, chance).pipeline()
            engine = Engine(pipeline, drafter=drafter, prefill_chunk=512, clock=time.process_time)
            contenders.append(Contender(engine=await stack.enter_async_context(engine), policy=policy))
        plain, guessed, adverse = contenders
        for each in (plain, guessed, guessed, adverse):
            await each.decode(toy)
        learnt, fresh = guessed.policy, adverse.policy
        if learnt is None or fresh is None:
            raise ValueError("two of them have heads")
        forget(fresh, toy)
        tokens, steps = learnt.counts.expected_tokens, learnt.counts.expected_steps
        taken: list[list[float]] = [[], [], []]
        for turn in range(rounds):
            order = range(3) if turn % 2 else range(2, -1, -1)
            for index in order:
                taken[index].append(await contenders[index].decode(toy))
        predicted = (learnt.counts.expected_tokens - tokens) / (learnt.counts.expected_steps - steps)
        known = [count for count in range(len(learnt.times.recent)) if learnt.times.known(count)]
        snapshot = guessed.engine.snapshot()
        return Turns(
            plain_s=taken[0],
            guessed_s=taken[1],
            adverse_s=taken[2],
            predicted=predicted,
            by_position=by_position(snapshot.head_drafts_by_position),
            law=[learnt.times.seconds(count) / learnt.times.seconds(0) for count in known],
            adverse_guesses=sum(fresh.counts.tries),
        )


def forget(policy: HeadPolicy, toy: Toy) -> None:
    """Make a policy as it was before the first token."""
    fresh = toy.policy()
    for name in ("counts", "everywhere", "times", "account", "probes", "steps"):
        setattr(policy, name, getattr(fresh, name))


def by_position(counts: Sequence[tuple[int, int]]) -> str:
    """Shares of guesses that were right, those before them having been."""
    return ", ".join(f"{hits / tries:.2f}" for tries, hits in counts if tries) or "none sent"


def toy_rows(folder: Path, *, rounds: int) -> tuple[list[Row], list[str]]:
    """Seconds a token, on one stage and on two; and how the toy's steps grow with guesses."""
    toy = Toy.made(folder)
    rows, notes = [], []
    for bounds in SPLITS:
        turns = asyncio.run(take_turns(toy, bounds, rounds=rounds))
        name = f"toy, {len(bounds) - 1} stage{'s' if len(bounds) > 2 else ''}"
        pairs = list(zip(turns.guessed_s, turns.plain_s, strict=True))
        rows.append(
            Row.of_pairs(
                f"{name}, acceptance {TINY_ACCEPTANCE:g}",
                [(one / (NEW - 1), other / (NEW - 1)) for one, other in pairs],
                unit="s",
                bar=GUESSED_BAR,
                note=f"right by position: {turns.by_position}",
                equal=True,
            )
        )
        gain = median(other / one for one, other in pairs)
        rows.append(
            Row(
                name=f"{name}, of the predicted gain",
                ours=gain,
                theirs=turns.predicted,
                unit="x",
                ratio=gain / turns.predicted,
                bar=PREDICTED_BAR,
                note="measured, against tokens/s that the policy expected",
            )
        )
        rows.append(
            Row(
                name=f"{name}, no guess right",
                ours=sum(turns.adverse_s) / rounds / (NEW - 1),
                theirs=sum(turns.plain_s) / rounds / (NEW - 1),
                unit="s",
                ratio=sum(turns.adverse_s) / sum(turns.plain_s),
                bar=ADVERSARIAL_BAR,
                direction="at most",
                note=f"{turns.adverse_guesses} guesses sent, learning among them",
                equal=True,
            )
        )
        notes.append(f"{name}: a step with 0, 1 ... guesses took {in_words(turns.law)} of a plain one")
    return rows, notes


def in_words(law: Sequence[float]) -> str:
    """Steps with 0, 1 ... guesses over a plain one."""
    return ", ".join(f"{each:.2f}" for each in law)
