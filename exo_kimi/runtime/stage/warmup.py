"""Warm-up of a stage: every kind of pass once, before the first request.

A GPU compiles a kernel when it is first asked for, and pages memory in when it is first read. All of that inside the first
request would be one long command buffer, which macOS may end (mlx-lm#1137). So the layers are run a few at a time first, and
then steps of every kind go through the worker as the leader would send them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from exo_kimi.arch.scratch import AttentionShape
from exo_kimi.arch.vision import CHANNELS, Grid
from exo_kimi.models.decode import LONGEST_RUN
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.caches import append, cut, has_states
from exo_kimi.runtime.stage.pictures import PictureTower
from exo_kimi.runtime.stage.resident import give_back_memory
from exo_kimi.runtime.stage.stage_model import pack, width_of
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import NO_EPOCH, PictureSpan, Segment, SequenceStart, Step

LAYERS_AT_ONCE = 2
LENGTHS = (1, 5, 20, 96, 256)
"""Tokens of a chunk: backends take other kernels from about 8 rows on and from about 32, and attention goes another way for
more than some 170 after others."""
FEW, MANY = LONGEST_RUN + 1, 96
"""Tokens of a short chunk, longer than what goes the way of decoding, and of a long one."""
_SEQUENCES = (1, 3, 12, 40)
"""How many sequences get a token each in one step: the same classes of rows."""
_MOST_KEYS = 4096
_GRIDS = (Grid(1, 2, 2), Grid(1, 4, 6), Grid(1, 10, 8), Grid(1, 16, 24))
"""Pictures of 1, 6, 20 and 96 tokens."""
_EPOCH = 1


def warm_up(worker: StageWorker, model: Model, *, after: Callable[[int], None]) -> int:
    """Run every kind of pass that a request may ask of this stage; whatever it took is given back.

    Args:
        worker: of the stage, without sequences.
        model: its layers.
        after: called after each pass with how many are done; a stage that is silent is taken for dead.

    Returns:
        The number of passes.

    Raises:
        StageError, StageOutOfMemoryError: a pass that a request would not survive either.
    """
    done = 0
    worker.reset(_EPOCH)
    try:
        for _ in _passes(_Steps(worker, model), model):
            done += 1
            after(done)
    finally:
        worker.reset(NO_EPOCH)
        if worker.tower is not None:
            worker.tower.forget()
        give_back_memory()
    return done


def _passes(steps: _Steps, model: Model) -> Iterator[None]:
    # Of experts that stay on disk, many tokens would have every one read, and few of them stay.
    lengths, counts = (LENGTHS, _SEQUENCES) if model.streamed is None else (LENGTHS[:2], _SEQUENCES[:2])
    yield from _layers(model, (MANY, 1) if model.streamed is None else (1,))
    for length in lengths:
        yield from steps.prompt(length, past=0)
        yield from steps.prompt(length, past=_past(model, length))
    for length in (FEW, 12):
        yield from steps.prompt(length, past=12)
    for count in counts:
        yield from steps.together(count)
    yield from steps.mixed(lengths)
    yield from steps.guesses()
    yield from steps.again(lengths[-1])
    if steps.worker.tower is not None:
        for grid in _GRIDS:
            yield from steps.picture(grid, steps.worker.tower)


def _layers(model: Model, lengths: Sequence[int]) -> Iterator[None]:
    """A chunk and a single token through a few layers at a time: their kernels, and all of their memory."""
    count = len(model.layers)
    for start in range(0, count, LAYERS_AT_ONCE):
        part = model.part(start, min(start + LAYERS_AT_ONCE, count))
        caches = part.make_cache()
        for length in lengths:
            mx.eval(part.forward_ragged(_noise(model, length), [(length, caches)]), [cache.state for cache in caches])
        yield


def _past(model: Model, length: int) -> int:
    """How many tokens before a chunk make attention go the other way than with none, in chunks of `MANY`; or one chunk."""
    attention = AttentionShape.of(model.args)
    alone = attention.prefers_absorbed(length, length)
    pasts = range(MANY, _MOST_KEYS, MANY)
    return next((past for past in pasts if attention.prefers_absorbed(length, past + length) != alone), MANY)


def _noise(model: Model, tokens: int, feature_layers: Sequence[int] = ()) -> mx.array:
    """(tokens, hidden_size) in the dtype of activations, or rows with features as `width_of` says."""
    dtype = model.layers[0].input_layernorm.weight.dtype
    return (mx.random.normal((tokens, width_of(model, feature_layers))) * 0.1).astype(dtype)


class _Steps:
    """Steps as a leader sends them, through one worker."""

    def __init__(self, worker: StageWorker, model: Model) -> None:
        self.worker = worker
        self._model = model
        self._step_id = self._seq_id = 0
        self._begun: list[SequenceStart] = []
        self._freed: list[int] = []

    def prompt(self, length: int, *, past: int) -> Iterator[None]:
        """A prompt whose last chunk has some length, after chunks of `MANY`; then two tokens."""
        seq_id = self._begin()
        for offset in range(0, past, MANY):
            chunk = min(MANY, past - offset)
            yield from self._run([Segment(seq_id=seq_id, offset=offset, length=chunk, sample=False)])
        offsets = [(past, length), (past + length, 1), (past + length + 1, 1)]
        for offset, count in offsets:
            yield from self._run([Segment(seq_id=seq_id, offset=offset, length=count, sample=True)])
        self._freed.append(seq_id)

    def together(self, count: int) -> Iterator[None]:
        """Short prompts of several sequences, then a token of each in one step, twice."""
        # Beside one that is longer, a prompt that decoding would take goes the way of prompts too.
        ids = {self._begin(): FEW if number % 2 == 0 else FEW // 2 for number in range(count)}
        for step in range(3):
            yield from self._run(
                [
                    Segment(seq_id=seq_id, offset=step and length + step - 1, length=1 if step else length, sample=True)
                    for seq_id, length in ids.items()
                ]
            )
        self._freed += ids

    def mixed(self, lengths: Sequence[int]) -> Iterator[None]:
        """Chunks, to the end of a prompt or not, beside single tokens of others."""
        old = [self._begin() for _ in range(2)]
        yield from self._run([Segment(seq_id=seq_id, offset=0, length=FEW, sample=True) for seq_id in old])
        offset = FEW
        for length in lengths:
            for sample in (True, False):
                new = self._begin()
                tokens = [Segment(seq_id=seq_id, offset=offset, length=1, sample=True) for seq_id in old]
                yield from self._run([*tokens, Segment(seq_id=new, offset=0, length=length, sample=sample)])
                self._freed.append(new)
                offset += 1
        self._freed += old

    def guesses(self) -> Iterator[None]:
        """Tokens with guesses after them, of one sequence and of several; the step after drops what was wrong. A head guesses
        as many after each."""
        proposed = 3 if self.worker.drafts is not None else 0
        ids = [self._begin() for _ in range(3)]
        yield from self._run([Segment(seq_id=seq_id, offset=0, length=FEW, sample=True) for seq_id in ids])
        offsets = dict.fromkeys(ids, FEW)
        for asked in (ids, ids[:1], ids):
            yield from self._run(
                [
                    Segment(seq_id=seq_id, offset=offsets[seq_id], length=4, sample=True, drafts=3, propose=proposed)
                    for seq_id in asked
                ]
            )
            for seq_id in asked:
                offsets[seq_id] += 1
        self._freed += ids

    def again(self, length: int) -> Iterator[None]:
        """A sequence that begins with a copy of another's caches; blocks as a disk keeps them."""
        first = self._begin()
        yield from self._run([Segment(seq_id=first, offset=0, length=length, sample=True)])
        caches = self._model.make_cache()
        kept = length if has_states(caches) else length // 2
        copy = self._begin(source=first, restore=kept)
        yield from self._run([Segment(seq_id=copy, offset=kept, length=FEW, sample=True)])
        self._freed += [first, copy]
        mx.eval(self._model.forward_ragged(_noise(self._model, length), [(length, caches)], asked=[0]))
        if has_states(caches):
            yield
            return
        blocks = cut(caches, 0, kept)
        empty = self._model.make_cache()
        append(empty, blocks, capacity=kept)
        append(empty, blocks, capacity=2 * kept)
        yield

    def picture(self, grid: Grid, tower: PictureTower) -> Iterator[None]:
        """A picture of noise between words, whole and cut into two chunks."""
        config = tower.model.config
        tokens = config.tokens(grid)
        pixels = np.random.default_rng(0).integers(0, 256, grid.patches * config.patch_size**2 * CHANNELS, np.uint8)
        picture = Picture.of(grid, pixels.tobytes())
        for cuts in ([tokens], [tokens // 2, tokens - tokens // 2]):
            seq_id = self._begin()
            offset = first = 0
            for number, count in enumerate(cuts):
                span = PictureSpan(1, count, picture.digest, first)
                last = number == len(cuts) - 1
                segment = Segment(
                    seq_id=seq_id, offset=offset, length=count + 2, sample=last, pictures=(span,) if count else ()
                )
                yield from self._run([segment], pictures=(picture,) if count else ())
                offset, first = offset + count + 2, first + count
            self._freed.append(seq_id)
        tower.forget()

    def _begin(self, *, source: int | None = None, restore: int = 0) -> int:
        """Register a sequence with the next step."""
        self._seq_id += 1
        sampling = SamplingParams(temperature=0.0)
        start = SequenceStart(seq_id=self._seq_id, prompt_tokens=1, sampling=sampling, source=source, restore=restore)
        self._begun.append(start)
        return self._seq_id

    def _run(self, segments: Sequence[Segment], *, pictures: tuple[Picture, ...] = ()) -> Iterator[None]:
        self._step_id += 1
        model, total = self._model, sum(segment.length for segment in segments)
        tokens = np.arange(total, dtype=np.int32) % model.args.vocab_size
        step = Step(
            epoch=_EPOCH,
            step_id=self._step_id,
            segments=tuple(segments),
            tokens=tokens,
            begin=tuple(self._begun),
            free=tuple(self._freed),
            hidden=None if model.is_first else pack(_noise(model, total, self.worker.feature_layers)),
            pictures=pictures,
        )
        self._begun, self._freed = [], []
        self.worker.execute(step)
        self.worker.run_ahead()
        yield
