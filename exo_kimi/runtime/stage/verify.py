"""Sampling after guesses: position by position, until the first token that is not the guess. It knows nothing of models.

Each token is drawn as it would be without the guesses: from the same logits, with the same number of the seed's stream and the
same penalties. So the guesses change no token, at any temperature; they only save steps.

Source: "Fast inference from transformers via speculative decoding", Leviathan et al. 2023, for a draft that is certain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exo_kimi.runtime.stage.sampling import SequenceSampler, sample
from exo_kimi.runtime.steps import Sampled


def sample_runs(
    logits: npt.NDArray[np.float32],
    samplers: Sequence[SequenceSampler],
    masks: Sequence[bytes | None],
    drafts: Sequence[npt.NDArray[np.int32]],
) -> tuple[Sampled, ...]:
    """Choose the next tokens of n sequences and note them in their samplers.

    Args:
        logits: float32 [sum of 1 + len(drafts), vocab_size], raw; for each sequence a row after its last known token, and
            one after each guess.
        samplers: n samplers.
        masks: n masks of allowed tokens.
        drafts: n arrays of guesses.

    Returns:
        For each sequence in order 1 to 1 + len(drafts) tokens: all but the last are equal to its guesses.

    Raises:
        StageError: a row that is looked at holds NaN or infinity, or nothing is allowed.
    """
    if not any(map(len, drafts)):
        return sample(logits, samplers, masks)
    firsts = np.cumsum([0, *(1 + len(guess) for guess in drafts)])
    runs: list[list[Sampled]] = [[] for _ in samplers]
    asked = list(range(len(samplers)))
    while asked:
        rows = [firsts[i] + len(runs[i]) for i in asked]
        found = sample(logits[rows], [samplers[i] for i in asked], [masks[i] for i in asked])
        for i, sampled in zip(asked, found, strict=True):
            runs[i].append(sampled)
        asked = [i for i in asked if len(runs[i]) <= len(drafts[i]) and _right(runs[i], drafts[i])]
    return tuple(sampled for run in runs for sampled in run)


def _right(run: list[Sampled], guess: npt.NDArray[np.int32]) -> bool:
    return run[-1].token_id == int(guess[len(run) - 1])
