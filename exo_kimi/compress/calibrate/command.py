"""`exo-kimi calibrate`: texts from files, or the project's own prompts, and where the scores go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.calibrate.calibrate import Calibration, calibrate
from exo_kimi.compress.calibrate.file import measured_to_json
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.errors import UsageError

Say = Callable[[str], None]


def calibrate_directory(
    directory: Path,
    files: Sequence[Path],
    output: Path,
    *,
    domain: str,
    most_tokens: int | None,
    dtype: str | None,
    say: Say,
) -> None:
    """Measure a checkpoint's experts and layers on texts, and write SCORES.json.

    Args:
        directory: the checkpoint.
        files: of the texts, see `read_texts`.
        output: SCORES.json; `SCORES.json.part` beside it is what a stopped run has done.
        domain: what the texts are about.
        most_tokens: of all texts together; None for all.
        dtype: of activations; None as stored.
        say: called with a line of progress.

    Raises:
        UsageError: no text, or the output cannot be written.
        CheckpointError, StageOutOfMemoryError: see `calibrate`.
    """
    if not output.parent.is_dir():
        raise UsageError("the scores cannot be written", found="no such directory", where=output.parent)
    texts = read_texts(files, Encoder.from_directory(directory), most_tokens=most_tokens)
    calibration = Calibration(
        walk=LayerWalk(checkpoint=Checkpoint(directory), dtype=dtype),
        texts=texts,
        domain=domain,
        files=tuple(file.name for file in files),
        kept=output.with_name(f"{output.name}.part"),
    )
    say(f"{len(texts)} texts, {sum(len(text.ids) for text in texts)} tokens")
    measured = calibrate(calibration, say=say)
    try:
        output.write_text(measured_to_json(measured), encoding="utf-8")
    except OSError as error:
        raise UsageError("the scores cannot be written", found=error.strerror, where=output) from None
