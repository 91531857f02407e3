"""Two nodes in legacy exo's shape, with what we bind in them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exo_kimi.plugin.bindings import mismatches
from exo_kimi.plugin.legacy.bindings import NAMES
from exo_kimi.plugin.legacy.launch import Session
from exo_kimi.plugin.legacy.setup import LegacyOptions, prepare_legacy
from exo_kimi.plugin.legacy.tokenizer import RenderedPrompt

PROMPT = "the sea is"  # as it is, without the template: some ten tokens
NAME = "kimi"


class Cluster:
    """Nodes with our bindings, one of them per machine of the plan."""

    def __init__(self, fake: Any, plan: Path, models: list[Path], patch: pytest.MonkeyPatch) -> None:
        self.fake, self.said, self.mains, self.sessions = fake, [], [], []
        for number, model in enumerate(models, 1):
            options = LegacyOptions(plan=plan, model=model, name=NAME)
            setup = prepare_legacy(options, ["--node-id", f"node{number}"])
            modules = fake.make_modules()
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            lines: list[str] = []
            self.said.append(lines)
            assert mismatches(NAMES) == ()
            session = Session(setup, lines.append)
            main = fake.make_main(modules, f"node{number}")
            session.attach(vars(main))
            self.mains.append(main)
            self.sessions.append(session)
        for main in self.mains:
            main.node.peers = [fake.Peer(other.node) for other in self.mains if other is not main]

    async def post(self, body: Any, *, number: int = 1, gone_after: int | None = None) -> Any:
        """As aiohttp calls exo's API."""
        api = self.mains[number - 1].api
        if isinstance(body, dict):
            body = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], **body}
        return await api.handle_post_chat_completions(self.fake.Request(body, gone_after))

    @property
    def nodes(self) -> list[Any]:
        return [main.node for main in self.mains]

    @property
    def stages(self) -> list[Any]:
        return [session._stage for session in self.sessions]

    @property
    def base_shard(self) -> Any:
        return self.fake.Shard(NAME, 0, 0, 7)

    async def ask(self, prompt: str = PROMPT, *, number: int = 1, request_id: str = "a") -> list[int]:
        """As exo's API: render, process, take tokens from the queue until the last."""
        main = self.mains[number - 1]
        api = main.node.modules["exo.api.chatgpt_api"]
        tokenizer = await api.resolve_tokenizer(f"exo-kimi/{NAME}")
        text = RenderedPrompt("what the template made of it", tokenizer.encode(prompt))
        await main.node.process_prompt(self.base_shard, text, request_id=request_id)
        tokens: list[int] = []
        while True:
            got, finished = await asyncio.wait_for(main.api.token_queues[request_id].get(), 20)
            tokens += got
            if finished:
                return tokens

    def loads(self, number: int) -> list[str]:
        return [line for line in self.said[number - 1] if line.startswith("loading layers") and line.count(":") == 1]


@pytest.fixture
def make(
    fake_legacy: ModuleType, legacy_plan: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Cluster]:
    def made(*models: Path) -> Cluster:
        return Cluster(fake_legacy, legacy_plan, list(models or (tiny, tiny)), monkeypatch)

    return made


@pytest.fixture
def legacy_cluster() -> type[Cluster]:
    """The class, for other plans."""
    return Cluster
