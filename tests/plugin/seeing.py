"""What a tiny Kimi with a vision tower answers about a picture in one process: the oracle of pictures inside exo."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

import exo_kimi
from exo_kimi.arch.vision import VisionConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader
from exo_kimi.plugin.runner.task import prepare_task
from exo_kimi.runtime.loading.vision import load_vision


def picture(color: str) -> str:
    """A small picture of one colour, as base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def text_about(directory: Path, params: Any, tokens: int) -> str:
    """The greedy answer to exo's task `params`, which has one picture."""
    checkpoint = Checkpoint(directory)
    vision = VisionConfig.from_dict(checkpoint.raw_config, hidden_size=checkpoint.config.hidden_size)
    assert vision is not None
    reader = PictureReader(PixelRules.from_directory(vision, directory))
    speaker = replace(Speaker.from_directory(directory), pictures=PicturePrompts(vision, reader))
    (choice,) = prepare_task("t", params, speaker).choices
    model, tower = exo_kimi.load(directory), load_vision(directory)
    shown = choice.request.pictures[0]
    pixels = np.frombuffer(shown.picture.pixels, np.uint8).reshape(1, shown.picture.grid.rows * 14, -1, 3)
    h = model.embed(mx.array(choice.request.prompt_ids))
    h[shown.start : shown.start + shown.tokens] = tower(mx.array(pixels), shown.picture.grid).astype(h.dtype)
    caches, found = model.make_cache(), list[int]()
    for _ in range(tokens):
        logits = model.logits(model.forward_ragged(h, [(len(h), caches)])[-1:])
        found.append(int(mx.argmax(logits[0]).item()))
        if found[-1] in speaker.tokenizer.stop_ids:
            break
        h = model.embed(mx.array(found[-1:]))
    return speaker.tokenizer.decode(token for token in found if not speaker.tokenizer.is_special(token))
