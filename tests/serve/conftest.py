"""A scripted engine and a live server for the API tests: the tokenizer and template are real, the tokens are chosen."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import EngineStoppedError, RuntimeFault
from exo_kimi.runtime.requests import (
    EngineSnapshot,
    ExpertHealth,
    GenerationRequest,
    RequestProgress,
    StageHealth,
    TokenEvent,
)
from exo_kimi.serve.app import create_app
from exo_kimi.serve.workers import THREADS

MODEL = "tiny-kimi"
DOCUMENTED: dict[bool, Any] = {}
Script = Callable[[GenerationRequest], Sequence[int]]

EXPERTS = ExpertHealth(
    slots=12,
    slot_bytes=1200,
    hits=7,
    misses=5,
    evictions=4,
    read_bytes=500,
    read_s=0.25,
    stall_s=0.125,
    failed_reads=1,
)


@dataclass(frozen=True, kw_only=True)
class Voice(Speaker):
    """The speaker of one checkpoint, and where that is."""

    directory: Path

    def ids(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are written by name."""
        names = sorted(self.tokenizer.special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [
            token
            for part in parts
            for token in (
                [self.tokenizer.special[part]] if part in self.tokenizer.special else self.tokenizer.encode(part)
            )
        ]


@dataclass
class ScriptedEngine:
    """A TextEngine that says what it is told to.

    `script` gives the tokens of a request; after them comes <|im_end|>. It breaks before token `break_at` with `fault`, waits
    `delay_s` before each token, and refuses with `refusal`. `room` is what its context has left for any request.
    """

    voice: Voice
    script: Script
    delay_s: float = 0.0
    first_delay_s: float = 0.0
    break_at: int | None = None
    fault: BaseException = field(default_factory=lambda: RuntimeFault("stage 1 died"))
    refusal: Exception | None = None
    room: int | None = None
    cached_tokens: int = 0
    ready: bool = True
    obeys: bool = True  # a grammar: what it forbids fails the test
    context: int = 4096
    stage_states: tuple[str, ...] = ("ready", "ready")
    requests: list[GenerationRequest] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    finished: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stopped: bool = False

    def check(self, request: GenerationRequest) -> int | None:
        if self.refusal is not None:
            raise self.refusal
        return min(filter(None, (self.room, request.max_tokens)), default=None)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        most = self.check(request)
        self.requests.append(request)
        self.open.add(request.request_id)
        end = self.voice.tokenizer.special["<|im_end|>"]
        try:
            await self._wait(self.first_delay_s)
            for count, token in enumerate([*self.script(request), end], start=1):
                if count - 1 == self.break_at:
                    raise self.fault
                await self._wait(self.delay_s)
                last = token in request.stop_ids or count == most
                event = self._event(request, token)
                if last:
                    reason = "stop" if token in request.stop_ids else "length"
                    self.finished.append(request.request_id)
                    yield replace(event, finish_reason=reason)
                    return
                yield event
        finally:
            self.open.discard(request.request_id)
            if request.request_id not in self.finished:
                self.cancelled.append(request.request_id)

    async def _wait(self, seconds: float) -> None:
        waited = 0.0
        while waited < seconds:
            await asyncio.sleep(min(0.01, seconds))
            waited += 0.01
            if self.stopped:
                raise EngineStoppedError("the server is shutting down")
        await asyncio.sleep(0)

    def _event(self, request: GenerationRequest, token: int) -> TokenEvent:
        constraint = request.constraint
        if constraint is not None and self.obeys:
            mask = constraint.mask()
            assert mask is None or mask[token // 8] >> (token % 8) & 1, f"the grammar forbids token {token}"
            constraint.accept(token)
        if not request.sampling.logprobs:
            return TokenEvent(token_id=token, cached_tokens=self.cached_tokens)
        top = tuple((other, -0.5 - other) for other in range(request.sampling.top_logprobs))
        return TokenEvent(token_id=token, logprob=-0.25, top_logprobs=top, cached_tokens=self.cached_tokens)

    def snapshot(self) -> EngineSnapshot:
        stages = tuple(
            StageHealth(
                stage=index,
                address=f"ipc://stage-{index}",
                state=state,
                start_layer=index,
                end_layer=index + 1,
                loaded_bytes=50,
                total_bytes=100,
                silent_s=0.5,
                last_error="exit code 137" if state == "dead" else None,
                experts=EXPERTS if index == 1 else None,
            )
            for index, state in enumerate(self.stage_states)
        )
        progress = [
            RequestProgress(request_id=name, state="prefill", prompt_tokens=8, prompt_done=4, generated_tokens=0)
            for name in sorted(self.open)
        ]
        return EngineSnapshot(
            ready=self.ready,
            stages=stages,
            requests=tuple(progress),
            context=self.context,
            kv_capacity_tokens=8192,
            kv_reserved_tokens=1024,
            requests_total=len(self.requests),
            preemptions_total=3,
            draft_tokens_total=9,
            draft_tokens_accepted_total=7,
            decode_bytes_total=2e12,
        )

    async def close(self) -> None:
        self.stopped = True


class LiveServer:
    """An app on a loopback port, served from a thread with an event loop of its own."""

    def __init__(self, factory: Callable[[], Awaitable[tuple[FastAPI, Any]]]) -> None:
        self._factory = factory
        self._started = threading.Event()
        self._server: uvicorn.Server | None = None
        self.engine: Any = None
        self.url = ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))  # as `server.run` does
        app, self.engine = await self._factory()
        config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self._started.set()
        await task
        await self.engine.close()

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._started.wait(60), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def voice_of(directory: Path) -> Voice:
    of = Speaker.from_directory(directory)
    return Voice(directory=directory, tokenizer=of.tokenizer, template=of.template, defaults=of.defaults)


@pytest.fixture(scope="session")
def make_voice() -> Callable[[Path], Voice]:
    """`make_voice(directory)`: the speaker of any checkpoint."""
    return voice_of


@pytest.fixture(scope="session")
def live_server() -> type[LiveServer]:
    """The class, for a server over an engine of the test's own making."""
    return LiveServer


@pytest.fixture(scope="session")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Voice:
    """A checkpoint that does not think."""
    return voice_of(make_tiny(tmp_path_factory.mktemp("instruct") / "tiny", template="instruct"))


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Voice:
    """A checkpoint whose prompts open the reasoning."""
    directory = tmp_path_factory.mktemp("k25") / "tiny"
    return voice_of(make_tiny(directory, template="k25", prefix=True))


@pytest.fixture
def saying(voice: Voice) -> Callable[..., ScriptedEngine]:
    """`saying(text, **options)`: an engine that answers every request with this text (control tokens by name)."""

    def make(
        text: str | Sequence[int] = "Hello there, friend.", *, by: Voice = voice, **options: Any
    ) -> ScriptedEngine:
        ids = by.ids(text) if isinstance(text, str) else list(text)
        return ScriptedEngine(voice=by, script=lambda request: ids, **options)

    return make


def call_text(name: str, arguments: Mapping[str, Any], *, number: int = 0) -> str:
    """A tool call as Kimi writes it, control tokens by name."""
    header = f"functions.{name}:{number}"
    text = json.dumps(arguments, ensure_ascii=False)
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>{header}<|tool_call_argument_begin|>{text}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    )


@pytest.fixture
def playing(voice: Voice) -> Callable[..., ScriptedEngine]:
    """`playing(first, second, ...)`: an agent's model. Turn n is played when the prompt holds the results of n calls."""

    def make(*turns: str, by: Voice = voice, **options: Any) -> ScriptedEngine:
        begin = by.tokenizer.special["<|tool_call_begin|>"]

        def script(request: GenerationRequest) -> list[int]:
            made = request.prompt_ids.count(begin)
            return by.ids(turns[min(made, len(turns) - 1)])

        return ScriptedEngine(voice=by, script=script, **options)

    return make


@pytest.fixture
def app_of() -> Callable[..., FastAPI]:
    """`app_of(engine, **options)`: the app over an engine."""

    def make(engine: ScriptedEngine, **options: Any) -> FastAPI:
        return create_app(engine, engine.voice, **{"model_id": MODEL, **options})

    return make


@pytest.fixture
def client_of(app_of: Callable[..., FastAPI]) -> Callable[..., httpx.AsyncClient]:
    """`client_of(engine, **options)`: an HTTP client that speaks to the app without a socket.

    Every status that it sees must be one that /openapi.json declares for the address.
    """

    def make(engine: ScriptedEngine, **options: Any) -> httpx.AsyncClient:
        app = app_of(engine, **options)

        async def declared(response: httpx.Response) -> None:
            path, method = response.request.url.path, response.request.method.lower()
            guarded = options.get("api_key") is not None
            if guarded not in DOCUMENTED:  # told in the same way by every app, and slow to make
                DOCUMENTED[guarded] = app.openapi()["paths"]
            paths = DOCUMENTED[guarded]
            known = [each for each in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", each), path)]
            operation = paths[known[-1]].get(method) if known else None
            assert operation is None or str(response.status_code) in operation["responses"], (path, response)

        transport = httpx.ASGITransport(app)
        hooks = {"response": [declared]}
        return httpx.AsyncClient(transport=transport, base_url="http://test", event_hooks=hooks)

    return make


@pytest.fixture
def live(app_of: Callable[..., FastAPI]) -> Iterator[Callable[..., LiveServer]]:
    """`live(engine, **options)`: a server on a loopback port, stopped at the end of the test."""
    servers: list[LiveServer] = []

    def start(engine: ScriptedEngine, **options: Any) -> LiveServer:
        async def factory() -> tuple[FastAPI, Any]:
            return app_of(engine, **options), engine

        servers.append(LiveServer(factory).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()
