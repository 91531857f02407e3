"""`exo-kimi calibrate`: one pass over texts, a layer at a time, that measures every expert and layer.

What is done is kept beside the output after each layer, so that a pass of hours over a terabyte goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.compress.calibrate.file import measured_to_json, read_measured
from exo_kimi.compress.calibrate.measures import LayerMeasures, Measured, weight_norms
from exo_kimi.compress.calibrate.routing import route
from exo_kimi.compress.layers import LayerWalk, TokenGroup, attend, groups_of
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import DecoderLayer
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.stage.resident import give_back_memory

OUTPUT_BYTES = 512 * 1024**2
"""Most bytes of the experts' outputs at a time: K + 1 of them a token, and what would be without each, in float32."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What to measure, and on what.

    Args:
        walk: over the checkpoint.
        texts: as token ids.
        domain: what they are about, in the user's words.
        files: where they came from.
        kept: a directory for what is done so far; None keeps nothing.
    """

    walk: LayerWalk
    texts: Sequence[Encoded]
    domain: str = "general"
    files: tuple[str, ...] = ()
    kept: Path | None = None

    @property
    def key(self) -> str:
        """What must be the same for a stopped pass to go on."""
        digest = hashlib.sha256(f"{self.walk.checkpoint.fingerprint} {self.walk.dtype}".encode())
        for text in self.texts:
            digest.update(text.ids.tobytes() + b"\n")
        return digest.hexdigest()

    def measured(self, layers: Sequence[LayerMeasures]) -> Measured:
        """The result, or its first layers."""
        return Measured(
            fingerprint=self.walk.checkpoint.fingerprint,
            chosen=self.walk.checkpoint.config.num_experts_per_tok,
            layers=tuple(layers),
            tokens=sum(len(text.ids) for text in self.texts),
            texts=len(self.texts),
            domain=self.domain,
            files=self.files,
        )


def calibrate(calibration: Calibration, *, say: Say = lambda _: None) -> Measured:
    """Run the pass.

    Args:
        calibration: what to measure.
        say: called with a line of progress after each layer.

    Raises:
        UsageError: there is no text, or no expert can be left out.
        StageOutOfMemoryError: one layer does not fit into memory.
        CheckpointError: the checkpoint cannot be read.
    """
    if not calibration.texts:
        raise UsageError("no text to calibrate on", fix="give --text FILE")
    walk = calibration.walk
    walk.check_room()
    groups = groups_of(calibration.texts)
    layers, hidden = _kept_so_far(calibration)
    if layers:
        say(f"going on after layer {len(layers) - 1}")
    for layer in range(len(layers), walk.layers):
        layers.append(_measure_layer(walk, layer, groups, hidden))
        give_back_memory()
        if calibration.kept is not None and len(layers) < walk.layers:
            _keep(calibration.kept, calibration, layers, hidden)
        say(f"layer {layer} of {walk.layers}")
    if calibration.kept is not None:
        shutil.rmtree(calibration.kept, ignore_errors=True)
    return calibration.measured(layers)


def _measure_layer(walk: LayerWalk, layer: int, groups: list[TokenGroup], hidden: list[mx.array]) -> LayerMeasures:
    """Load a layer, run it over all hidden states, which become those after it, and let it go."""
    model = walk.load(layer)
    if model.is_first:
        hidden[:] = [model.embed(group.ids) for group in groups]
    decoder = model.layers[0]
    measures = _empty(decoder)
    for index, group in enumerate(groups):
        hidden[index] = _measure(decoder, hidden[index], group, measures)
        mx.eval(hidden[index])
    return measures


def _empty(decoder: DecoderLayer) -> LayerMeasures:
    if not isinstance(decoder.mlp, MoE):
        return LayerMeasures.empty(0)
    measures = LayerMeasures.empty(decoder.mlp.gate.weight.shape[0])
    measures.weight_norm = weight_norms(decoder.mlp.switch_mlp)
    return measures


def _measure(decoder: DecoderLayer, x: mx.array, group: TokenGroup, measures: LayerMeasures) -> mx.array:
    """(N, D) after the layer, with what was seen on the way counted."""
    h = attend(decoder, x, group)
    normed = decoder.post_attention_layernorm(h)
    if not isinstance(decoder.mlp, MoE):
        after = h + decoder.mlp(normed)
    else:
        after = h + mx.concatenate([_experts(decoder.mlp, part, measures) for part in _parts(decoder.mlp, normed)])
    measures.add_block(x, after)
    return after


def _experts(moe: MoE, x: mx.array, measures: LayerMeasures) -> mx.array:
    routed = route(moe, x)
    measures.add_routed(routed)
    y = routed.together
    y = y + moe.shared_experts(x) if "shared_experts" in moe else y
    mx.eval(y)
    return y


def _parts(moe: MoE, x: mx.array) -> list[mx.array]:
    """Rows of x, so few at a time that the experts' outputs stay under their bound."""
    row_bytes = 4 * x.shape[-1] * 4 * (moe.gate.chosen + 1)
    step = max(1, OUTPUT_BYTES // row_bytes)
    return [x[start : start + step] for start in range(0, x.shape[0], step)]


def _keep(folder: Path, calibration: Calibration, layers: list[LayerMeasures], hidden: list[mx.array]) -> None:
    """Write what is done; the small file that names the large one is replaced last."""
    folder.mkdir(parents=True, exist_ok=True)
    states = folder / f"hidden-{len(layers)}.safetensors"
    mx.save_safetensors(str(states), {str(index): each for index, each in enumerate(hidden)})
    scores = folder / f"scores-{len(layers)}.json"
    scores.write_text(measured_to_json(calibration.measured(layers)), encoding="utf-8")
    note = folder / "done.json.part"
    note.write_text(json.dumps({"key": calibration.key, "layers": len(layers)}), encoding="utf-8")
    note.replace(folder / "done.json")
    for old in (*folder.glob("hidden-*"), *folder.glob("scores-*")):
        if old not in (states, scores):
            old.unlink()


def _kept_so_far(calibration: Calibration) -> tuple[list[LayerMeasures], list[mx.array]]:
    note = None if calibration.kept is None else calibration.kept / "done.json"
    if calibration.kept is None or note is None or not note.exists():
        return [], []
    done = json.loads(note.read_text(encoding="utf-8"))
    if done["key"] != calibration.key:
        raise UsageError(
            "a stopped calibration of something else is in the way",
            expected="the same checkpoint, texts and dtype",
            where=calibration.kept,
            fix="remove that directory, or give another -o",
        )
    count = done["layers"]
    states: Any = mx.load(str(calibration.kept / f"hidden-{count}.safetensors"))
    measured = read_measured(calibration.kept / f"scores-{count}.json")
    return list(measured.layers), [states[str(index)] for index in range(len(states))]
