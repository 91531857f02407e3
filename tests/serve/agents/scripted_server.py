"""Run in a process of its own: the real server over an engine that plays an agent's turns.

    python scripted_server.py CHECKPOINT PORT FOLDER

FOLDER/turns.json has the turns: `{"tool": name, "says": text, "after_s": seconds}`. Turn n is played when the prompt holds n
calls and declares the turn's tool; any other prompt (a title, a summary) gets a short text. FOLDER/prompts.jsonl gets the token
ids of every prompt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.vision import NoVision, find_vision
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import EngineStoppedError
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, TokenEvent
from exo_kimi.serve.app import create_app
from exo_kimi.serve.server import Served, run

CONTEXT = 262_144


class PlayingEngine:
    def __init__(self, speaker: Speaker, folder: Path) -> None:
        self._tokenizer = speaker.tokenizer
        self._turns = json.loads((folder / "turns.json").read_text())
        self._prompts = folder / "prompts.jsonl"
        self._seen: list[tuple[int, ...]] = []
        self._stopped = False

    def check(self, request: GenerationRequest) -> int:
        return min(request.max_tokens or CONTEXT, CONTEXT - len(request.prompt_ids))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        ids = request.prompt_ids
        with self._prompts.open("a") as file:
            file.write(json.dumps(ids) + "\n")
        cached = max((_common(ids, seen) for seen in self._seen), default=0)
        self._seen.append(ids)
        end = self._tokenizer.special["<|im_end|>"]
        turn = self._turn(ids)
        await asyncio.sleep(turn.get("after_s", 0))
        tokens = [*self._encode(turn["says"]), end]
        for place, token in enumerate(tokens, start=1):
            await asyncio.sleep(0)
            if self._stopped:
                raise EngineStoppedError("the server is shutting down")
            last = "stop" if place == len(tokens) else "length" if place == request.max_tokens else None
            yield TokenEvent(token_id=token, finish_reason=last, cached_tokens=cached)
            if last:
                return

    def _turn(self, ids: tuple[int, ...]) -> dict[str, Any]:
        made = ids.count(self._tokenizer.special["<|tool_call_begin|>"])
        declared = self._turns[0]["tool"] in self._tokenizer.decode(ids)
        turn: dict[str, Any] = self._turns[min(made, len(self._turns) - 1)]
        return turn if declared else {"says": "Short.</think>A greeting"}

    def _encode(self, text: str) -> list[int]:
        special = self._tokenizer.special
        parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
        return [
            token for part in parts for token in ([special[part]] if part in special else self._tokenizer.encode(part))
        ]

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            ready=True, stages=(), requests=(), context=CONTEXT, kv_capacity_tokens=CONTEXT, kv_reserved_tokens=0
        )

    async def close(self) -> None:
        self._stopped = True


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def seeing(directory: Path) -> Speaker:
    """The speaker of a checkpoint, with its tower's rules for pictures where it has one."""
    speaker = Speaker.from_directory(directory)
    tower = find_vision(open_index(directory))
    if isinstance(tower, NoVision):
        return speaker
    rules = PixelRules.from_directory(tower.config, directory)
    return replace(speaker, pictures=PicturePrompts(tower.config, PictureReader(rules)))


async def make() -> Served:
    speaker = seeing(Path(sys.argv[1]))
    engine = PlayingEngine(speaker, Path(sys.argv[3]))
    return Served(app=create_app(engine, speaker, model_id="kimi"), engine=engine)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    run(make, port=int(sys.argv[2]), announce=lambda url: print(url, flush=True), progress=False)
