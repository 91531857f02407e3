"""The experts that texts are routed to, recorded by one pass with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.layers import LayerWalk, attend, groups_of
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.errors import UsageError
from exo_kimi.experts.traces.trace import ExpertTrace
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.stage.resident import give_back_memory

Say = Callable[[str], None]


def record(walk: LayerWalk, texts: Sequence[Encoded], *, source: str = "", say: Say = lambda _: None) -> ExpertTrace:
    """A trace of texts, one after another, as if a single sequence decoded them all.

    Args:
        walk: over the checkpoint's layers.
        texts: as token ids.
        source: what they are, for people.
        say: called with a line of progress after each layer.

    Raises:
        UsageError: there is no text, or no layer has routed experts.
        StageOutOfMemoryError: one layer does not fit into memory.
        CheckpointError: the checkpoint cannot be read.
    """
    if not texts:
        raise UsageError("no text to record", fix="give --text FILE")
    config = walk.checkpoint.config
    layers = [layer for layer in walk.numbers if config.is_moe(layer)]
    if not layers:
        raise UsageError("a model without routed experts has no routes", where=walk.checkpoint.directory)
    walk.check_room()
    groups = groups_of(texts)
    hidden: list[mx.array] = []
    routes = []
    for layer in walk.numbers:
        model = walk.load(layer)
        if model.is_first:
            hidden = [model.embed(group.ids) for group in groups]
        decoder, chosen = model.layers[0], []
        for index, group in enumerate(groups):
            x = attend(decoder, hidden[index], group)
            y = decoder.post_attention_layernorm(x)
            if isinstance(decoder.mlp, MoE):
                chosen.append(np.array(decoder.mlp.gate(y)[0]))
            hidden[index] = x + decoder.mlp(y)
            mx.eval(hidden[index])
        if chosen:
            routes.append(np.concatenate(chosen))
        del model, decoder
        give_back_memory()
        say(f"layer {layer} of {walk.layers}")
    return ExpertTrace.of_tokens(np.stack(routes), experts=config.n_routed_experts, layers=layers, source=source)


def record_directory(
    directory: Path, files: Sequence[Path], output: Path, *, most_tokens: int | None, dtype: str | None, say: Say
) -> str:
    """Record what a checkpoint does with the texts of files, and write the trace; returns what there is to say of it.

    Args:
        directory: the checkpoint.
        files: of the texts, see `read_texts`.
        output: TRACE.npz.
        most_tokens: of all texts together; None for all.
        dtype: of activations; None as stored.
        say: called with a line of progress.

    Raises:
        UsageError: no text, or the output cannot be written.
        CheckpointError, StageOutOfMemoryError: see `record`.
    """
    if not output.parent.is_dir():
        raise UsageError("the trace cannot be written", found="no such directory", where=output.parent)
    checkpoint = Checkpoint(directory)
    texts = read_texts(files, Encoder.from_directory(directory), most_tokens=most_tokens)
    source = f"{checkpoint.directory.resolve().name}: {', '.join(file.name for file in files)}"
    trace = record(LayerWalk(checkpoint=checkpoint, dtype=dtype), texts, source=source, say=say)
    try:
        trace.save(output)
    except OSError as error:
        raise UsageError("the trace cannot be written", found=error.strerror, where=output) from None
    return (
        f"{trace.tokens} tokens of {len(texts)} texts through {len(trace.layers)} layers are in {output}; "
        f"see `exo-kimi trace replay {output}`"
    )
