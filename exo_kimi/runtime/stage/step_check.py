"""Whether a step follows what a stage holds; it knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

from exo_kimi.errors import ProtocolError
from exo_kimi.runtime.stage.sequence_state import Held
from exo_kimi.runtime.steps import Step


def check_step(step: Step, held: Mapping[int, Held], *, vocab_size: int, stage: int | None) -> None:
    """Check the segments of a step.

    Args:
        step: that came.
        held: by sequence, once the step has freed and begun some.
        vocab_size: ids are below it.
        stage: its index, for errors.

    Raises:
        ProtocolError: what contradicts what.
    """
    total = sum(segment.length for segment in step.segments)
    if step.tokens.shape != (total,):
        raise ProtocolError(
            "the tokens of a step do not fill its segments",
            stage=stage,
            expected=f"{total} tokens",
            found=f"shape {step.tokens.shape}",
        )
    if len({segment.seq_id for segment in step.segments}) != len(step.segments):
        raise ProtocolError("a sequence has two segments in one step", stage=stage)
    if total and not 0 <= int(step.tokens.min()) <= int(step.tokens.max()) < vocab_size:
        raise ProtocolError(
            "a token id outside the vocabulary",
            stage=stage,
            expected=f"0 to {vocab_size - 1}",
            found=f"{step.tokens.min()} to {step.tokens.max()}",
        )
    for segment in step.segments:
        entry = held.get(segment.seq_id)
        if entry is None or not entry.length - entry.drafts <= segment.offset <= entry.length or segment.length < 1:
            raise ProtocolError(
                f"a segment of sequence {segment.seq_id} does not follow what the stage holds",
                stage=stage,
                expected="a sequence that was begun"
                if entry is None
                else f"offset {entry.length}{f' or up to {entry.drafts} less' * bool(entry.drafts)}, length at least 1",
                found=f"offset {segment.offset}, length {segment.length}",
            )
        if segment.drafts and (segment.drafts >= segment.length or not segment.sample or segment.mask is not None):
            raise ProtocolError(
                f"drafts of sequence {segment.seq_id} that cannot be checked",
                stage=stage,
                expected="a token before them, `sample`, and no mask",
                found=f"length {segment.length}, {segment.drafts} drafts",
            )
