"""Pictures on the first stage: their vectors, made by the tower once and kept for a while, in the place of media tokens."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import mlx.core as mx
import numpy as np

from exo_kimi.arch.vision import KEPT_VECTORS
from exo_kimi.errors import ProtocolError
from exo_kimi.models.vision import VisionModel
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.steps import Segment, Step


class PictureTower:
    """The tower of a stage, and the vectors that it made lately.

    Args:
        model: the tower.
        kept_vectors: most vectors that are kept between steps.

    Attributes:
        runs: how often the tower ran.
    """

    def __init__(self, model: VisionModel, *, kept_vectors: int = KEPT_VECTORS) -> None:
        self.model = model
        self.runs = 0
        self._most = kept_vectors
        self._kept: OrderedDict[str, mx.array] = OrderedDict()

    def embed(self, step: Step, text: StageModel) -> mx.array:
        """(N, D): the tokens of a step as vectors, those of pictures from the tower.

        Raises:
            ProtocolError: pictures that do not fit their spans.
        """
        h = text.embed(mx.array(step.tokens))
        pictures = {picture.digest: picture for picture in step.pictures}
        begin = 0
        for segment in step.segments:
            for span in segment.pictures:
                if span.digest not in pictures:
                    raise ProtocolError(f"picture {span.digest[:8]} of sequence {segment.seq_id} did not come")
                vectors = self._vectors(pictures[span.digest])
                if span.start + span.tokens > segment.length or span.first + span.tokens > len(vectors):
                    raise ProtocolError(
                        f"a picture of sequence {segment.seq_id} does not fit",
                        expected=f"{segment.length} tokens, {len(vectors)} vectors",
                        found=f"{span.tokens} from token {span.start}, from vector {span.first}",
                    )
                rows = slice(begin + span.start, begin + span.start + span.tokens)
                h[rows] = vectors[span.first : span.first + span.tokens].astype(h.dtype)
            begin += segment.length
        self._trim()
        return h

    def forget(self) -> None:
        """Let go of the vectors that are kept."""
        self._kept.clear()

    def _vectors(self, picture: Picture) -> mx.array:
        found = self._kept.get(picture.digest)
        if found is None:
            found = self._kept[picture.digest] = self._run(picture)
        self._kept.move_to_end(picture.digest)
        return found

    def _run(self, picture: Picture) -> mx.array:
        config, grid = self.model.config, picture.grid
        shape = (grid.frames, grid.rows * config.patch_size, grid.columns * config.patch_size, 3)
        height, width = config.merge_kernel_size
        if len(picture.pixels) != np.prod(shape) or grid.rows % height or grid.columns % width:
            raise ProtocolError(
                f"the pixels of picture {picture.digest[:8]} do not fill its grid",
                expected=f"{np.prod(shape)} bytes, rows by {height}, columns by {width}",
                found=f"{len(picture.pixels)} bytes, {grid.rows} rows, {grid.columns} columns",
            )
        self.runs += 1
        return self.model(mx.array(np.frombuffer(picture.pixels, np.uint8).reshape(shape)), grid)

    def _trim(self) -> None:
        total = sum(len(vectors) for vectors in self._kept.values())
        while total > self._most and self._kept:
            _, oldest = self._kept.popitem(last=False)
            total -= len(oldest)


def without_pictures(step: Step) -> Step:
    """A step as the stages after the first get it."""
    if not step.pictures:
        return step
    return replace(step, pictures=(), segments=tuple(map(_plain, step.segments)))


def _plain(segment: Segment) -> Segment:
    return replace(segment, pictures=()) if segment.pictures else segment
