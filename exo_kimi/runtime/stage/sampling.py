"""Choosing the next token from a row of logits, and checking guesses against the tokens so chosen.

It runs in numpy float64 on the last stage: the choice is then the same on every backend, and ties have one answer (the
lowest id). The order is: penalties, logit_bias, mask, temperature, top_k, top_p, min_p, one draw.

After guesses, each token is drawn as it would be without them: from the same logits, with the same number of the seed's stream
and the same penalties. So guesses change no token, at any temperature; they only save steps.

Source: the order of transformers' `GenerationMixin._get_logits_processor` (warpers top_k, top_p, min_p); for guesses "Fast
inference from transformers via speculative decoding", Leviathan et al. 2023, for a draft that is certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exo_kimi.errors import ProtocolError, StageError
from exo_kimi.runtime.steps import Sampled, SequenceStart
from exo_kimi.runtime.token_mask import allowed

Row = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class SequenceSampler:
    """What sampling remembers of one sequence: its parameters, what was generated, and what penalties look at.

    Args:
        start: the sequence as it was registered; its history counts as generated.
    """

    __slots__ = (
        "bias_ids",
        "biases",
        "counts",
        "generated_tokens",
        "only_bars",
        "params",
        "prompt_tokens",
        "run",
        "seed",
        "seen",
        "seq_id",
    )

    def __init__(self, start: SequenceStart) -> None:
        if start.sampling.seed is None and start.sampling.temperature > 0:
            raise ProtocolError(f"sequence {start.seq_id} samples without a seed", fix="the engine draws one")
        self.seq_id = start.seq_id
        self.params = start.sampling
        self.seed = (start.sampling.seed or 0) % 2**64
        self.prompt_tokens = start.prompt_tokens
        # Made once: a client may bias the whole vocabulary, and every token of every sequence would wait for a loop over it.
        self.bias_ids = np.array([token_id for token_id, _ in start.sampling.logit_bias], np.int64)
        self.biases = np.array([bias for _, bias in start.sampling.logit_bias], np.float64)
        self.only_bars = frozenset(self.bias_ids.tolist()) if (self.biases <= 0).all() else None
        self.counts: Counter[int] = Counter(start.history)
        self.generated_tokens = len(start.history)
        self.seen: set[int] = {*start.history, *start.seen}
        self.run: list[tuple[int, bool]] = []  # accepted since the last `begin_run`, and whether that was seen before

    @property
    def is_plain(self) -> bool:
        """Whether the choice is the largest raw logit, whichever that is."""
        p = self.params
        penalised = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        return p.temperature == 0 and not penalised and not len(self.bias_ids)

    def keeps_largest(self, token_id: int) -> bool:
        """Whether the choice is the largest raw logit, which is this token's: biases only bar others."""
        p = self.params
        penalised = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        unbiased = self.only_bars is not None and token_id not in self.only_bars
        return p.temperature == 0 and not penalised and unbiased

    def observe(self, tokens: npt.NDArray[np.int32]) -> None:
        """Note tokens that were fed, for the repetition penalty."""
        if self.params.repetition_penalty != 1:
            self.seen.update(tokens.tolist())

    def accept(self, token_id: int) -> None:
        """Note a token that was generated."""
        self.run.append((token_id, token_id in self.seen))
        self.counts[token_id] += 1
        self.seen.add(token_id)
        self.generated_tokens += 1

    def begin_run(self, *, keep: int) -> None:
        """A new segment came: of the tokens accepted for the one before, the leader kept the first `keep`."""
        self.forget(len(self.run) - min(keep, len(self.run)))
        self.run.clear()

    def forget(self, count: int) -> None:
        """Take back the last tokens that were accepted since `begin_run`."""
        for _ in range(count):
            token_id, seen_before = self.run.pop()
            self.counts[token_id] -= 1
            if not self.counts[token_id]:
                del self.counts[token_id]
            if not seen_before:
                self.seen.discard(token_id)
            self.generated_tokens -= 1


def sample(
    logits: npt.NDArray[np.float32], samplers: Sequence[SequenceSampler], masks: Sequence[bytes | None]
) -> tuple[Sampled, ...]:
    """Choose one token a row and note it in the row's sampler.

    Args:
        logits: float32 [n, vocab_size], raw.
        samplers: n samplers.
        masks: n masks of allowed tokens (see `TokenConstraint.mask`).

    Raises:
        StageError: a row holds NaN or infinity, or nothing is allowed.
    """
    best = logits.argmax(axis=1)
    top = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]  # argmax finds a NaN first
    chosen = []
    for row, (sampler, mask) in enumerate(zip(samplers, masks, strict=True)):
        if not np.isfinite(top[row]):
            raise StageError(
                f"the logits of sequence {sampler.seq_id} are not finite",
                expected="finite numbers",
                found=f"{int(np.isnan(logits[row]).sum())} NaN of {logits.shape[1]}, maximum {top[row]}",
                fix="check the checkpoint with `exo-kimi inspect`; float16 activations may overflow, bfloat16 do not",
            )
        greedy = mask is None and sampler.keeps_largest(int(best[row]))
        token_id = int(best[row]) if greedy else _choose(logits[row], sampler, mask)
        sampler.accept(token_id)
        logprob, top_logprobs = _logprobs(logits[row], token_id, sampler)
        chosen.append(Sampled(seq_id=sampler.seq_id, token_id=token_id, logprob=logprob, top_logprobs=top_logprobs))
    return tuple(chosen)


def sample_runs(
    logits: npt.NDArray[np.float32],
    samplers: Sequence[SequenceSampler],
    masks: Sequence[Sequence[bytes | None]],
    drafts: Sequence[npt.NDArray[np.int32]],
) -> tuple[Sampled, ...]:
    """Choose the next tokens of n sequences and note them in their samplers.

    Args:
        logits: float32 [sum of 1 + len(drafts), vocab_size], raw; for each sequence a row after its last known token, and
            one after each guess.
        samplers: n samplers.
        masks: for each sequence the mask of allowed tokens of each of its rows.
        drafts: n arrays of guesses.

    Returns:
        For each sequence in order 1 to 1 + len(drafts) tokens: all but the last are equal to its guesses.

    Raises:
        StageError: a row that is looked at holds NaN or infinity, or nothing is allowed.
    """
    if not any(map(len, drafts)):
        return sample(logits, samplers, [mask for mask, *_ in masks])
    firsts = np.cumsum([0, *(1 + len(guess) for guess in drafts)])
    runs: list[list[Sampled]] = [[] for _ in samplers]
    asked = list(range(len(samplers)))
    while asked:
        rows = [firsts[i] + len(runs[i]) for i in asked]
        found = sample(logits[rows], [samplers[i] for i in asked], [masks[i][len(runs[i])] for i in asked])
        for i, sampled in zip(asked, found, strict=True):
            runs[i].append(sampled)
        asked = [i for i in asked if len(runs[i]) <= len(drafts[i]) and _right(runs[i], drafts[i])]
    return tuple(sampled for run in runs for sampled in run)


def guess_token(logits: npt.NDArray[np.float32], sampler: SequenceSampler) -> int | None:
    """Guess a sequence's next token as the model would choose it, from a draft head's logits, and note it in the sampler.

    The same penalties, biases and cuts, and the same number of the seed's stream: where head and model agree, so do their tokens.
    Whoever guesses takes the tokens back with `SequenceSampler.forget`.

    Args:
        logits: float32 [vocab_size], -inf for what the head cannot guess.
        sampler: of the sequence.

    Returns:
        None where nothing can be guessed.
    """
    if not np.isfinite(logits.max()):
        return None
    token_id = _choose(logits, sampler, None)
    sampler.accept(token_id)
    return token_id


def _right(run: list[Sampled], guess: npt.NDArray[np.int32]) -> bool:
    return run[-1].token_id == int(guess[len(run) - 1])


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of a seed's stream, without having drawn the ones before it.

    Source: Philox 4x64-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    bits = int(np.random.Philox(key=seed % 2**64, counter=n).random_raw())
    return float(bits >> 11) * 2.0**-53


def _choose(logits: npt.NDArray[np.float32], sampler: SequenceSampler, mask: bytes | None) -> int:
    row = _adjusted(logits.astype(np.float64), sampler)
    if mask is not None:
        row[~allowed(mask, len(row))] = -np.inf
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise StageError(f"no token is allowed for sequence {sampler.seq_id}", found="a mask without a finite logit")
    if sampler.params.temperature == 0:
        return best
    # Subtracting first keeps a tiny temperature from overflowing.
    with np.errstate(over="ignore"):
        weights = np.exp((row - row[best]) / sampler.params.temperature)
    ids = _candidates(weights, sampler)
    # In the order of ids, not of weights: rounding that swaps two near-equal weights then moves no other token.
    cumulative = np.cumsum(weights if ids is None else weights[ids])
    point = uniform(sampler.seed, sampler.generated_tokens) * cumulative[-1]
    index = min(int(cumulative.searchsorted(point, side="right")), int(cumulative.searchsorted(cumulative[-1])))
    return index if ids is None else int(ids[index])


def _adjusted(row: Row, sampler: SequenceSampler) -> Row:
    """`row` after penalties and bias, in place. Source: OpenAI API reference; CTRL, Keskar et al. 2019, section 4.1."""
    params = sampler.params
    if params.repetition_penalty != 1 and sampler.seen:
        ids = np.fromiter(sampler.seen, np.int64, len(sampler.seen))
        values = row[ids]
        row[ids] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty != 0 or params.frequency_penalty != 0) and sampler.counts:
        ids = np.fromiter(sampler.counts, np.int64, len(sampler.counts))
        times = np.fromiter(sampler.counts.values(), np.float64, len(sampler.counts))
        row[ids] -= params.presence_penalty + params.frequency_penalty * times
    np.add.at(row, sampler.bias_ids, sampler.biases)
    return row


def _candidates(weights: Row, sampler: SequenceSampler) -> Ids | None:
    """Ids that survive top_k, top_p and min_p, ascending; None when all do. The largest weight is 1."""
    params = sampler.params
    ids: Ids | None = None
    if 0 < params.top_k < len(weights):
        ids = _largest(weights, params.top_k)
    if params.top_p < 1:
        ids = _nucleus(weights, params.top_p) if ids is None else ids[_cut(weights[ids], params.top_p)]
    if params.min_p > 0:
        ids = np.flatnonzero(weights >= params.min_p) if ids is None else ids[weights[ids] >= params.min_p]
    return None if ids is None else np.sort(ids)


def _largest(weights: Row, k: int) -> Ids:
    """The k ids of largest weight, best first; among equals the lowest ids."""
    if k >= len(weights):
        return np.argsort(-weights, kind="stable")
    floor = np.partition(weights, len(weights) - k)[len(weights) - k]
    above = np.flatnonzero(weights > floor)
    ids = np.concatenate([above, np.flatnonzero(weights == floor)[: k - len(above)]])
    return ids[np.argsort(-weights[ids], kind="stable")]


def _nucleus(weights: Row, top_p: float) -> Ids:
    """The fewest ids, best first, that hold `top_p` of the whole weight; at least one."""
    total = float(weights.sum())
    # All weights below the floor together are less than what may be left out, so only the others need sorting; half of it
    # leaves room for rounding.
    floor = (1 - top_p) * total / len(weights) / 2
    ids = np.flatnonzero(weights >= floor)
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    return ids[_cut(weights[ids], top_p, total)]


def _cut(weights: Row, top_p: float, total: float | None = None) -> slice:
    cumulative = np.cumsum(weights)
    return slice(int(cumulative.searchsorted(top_p * (cumulative[-1] if total is None else total))) + 1)


def _logprobs(
    logits: npt.NDArray[np.float32], token_id: int, sampler: SequenceSampler
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-softmax of the raw logits at `token_id`, and the best ids with theirs, when they were asked for."""
    params = sampler.params
    if not params.logprobs:
        return None, ()
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best = _largest(row, params.top_logprobs) if params.top_logprobs > 0 else np.empty(0, np.int64)
    return float(row[token_id]), tuple((int(i), float(row[i])) for i in best)
