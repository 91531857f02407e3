"""Run by test_server in a process of its own: `server.run` over an engine that says one token every 50 ms for ever."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import EngineStoppedError
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, TokenEvent
from exo_kimi.serve.app import create_app
from exo_kimi.serve.server import Served, run

CONTEXT = int(sys.argv[3]) if len(sys.argv) > 3 else 4096  # tokens


class EndlessEngine:
    def __init__(self) -> None:
        self.stopped = False
        self.closed = 0
        self.requests = 0

    def check(self, request: GenerationRequest) -> None:
        if self.stopped:
            raise EngineStoppedError("the server is shutting down")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests += 1
        while True:
            await asyncio.sleep(0.05)
            self.check(request)
            yield TokenEvent(token_id=300)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            ready=True,
            stages=(),
            requests=(),
            context=CONTEXT,
            kv_capacity_tokens=CONTEXT,
            kv_reserved_tokens=0,
            requests_total=self.requests,
        )

    async def close(self) -> None:
        self.stopped = True
        self.closed += 1
        print(f"closed {self.closed}", flush=True)


async def make() -> Served:
    engine = EndlessEngine()
    speaker = Speaker.from_directory(Path(sys.argv[1]))
    return Served(app=create_app(engine, speaker, model_id="stub"), engine=engine)


if __name__ == "__main__":
    run(make, port=int(sys.argv[2]), announce=lambda url: print(url, flush=True))
    print("left", flush=True)
