"""Starts legacy exo (0.0.x) with our model, plan and preload hook: `exo-kimi exo-legacy --plan PLAN -- ARGS`.

exo parses its arguments and builds its node when `exo.main` is imported. So names are bound before, after a check of their
signatures, and callbacks registered after. Importing this module binds nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from exo_kimi.errors import ExoKimiError, ExoVersionError, UsageError
from exo_kimi.plugin.bindings import mismatches
from exo_kimi.plugin.legacy.bindings import (
    MAIN_NAMES,
    NAMES,
    TESTED,
    Bound,
    bind_api,
    bind_arrays,
    bind_card,
    bind_engine,
    bind_node,
    bind_partition,
    bind_tokenizer,
    rename_loader,
)
from exo_kimi.plugin.legacy.setup import LegacyOptions, LegacySetup, prepare_legacy

Say = Callable[[str], None]


def run(options: LegacyOptions, arguments: Sequence[str], *, say: Say | None = None) -> None:
    """Start legacy exo in this process: the body of `exo-kimi exo-legacy`.

    Args:
        options: ours.
        arguments: exo's own.
        say: takes lines for the user; None prints them.

    Raises:
        ExoVersionError: there is no legacy exo.
        ExoKimiError: as `prepare_legacy`.
    """
    say = say or _say
    setup = prepare_legacy(options, arguments)
    _find_exo(options)
    session = _begin(setup, say)
    sys.argv = ["exo", *setup.arguments]
    main = importlib.import_module("exo.main")
    if session is not None:
        session.attach(vars(main))
    main.run()


def begin() -> Session | None:
    """What a patched exo calls before it parses its arguments, if EXO_KIMI_PLAN is set; None leaves exo as it is.

    Raises:
        SystemExit: the plan or the checkpoint cannot be used.
    """
    try:
        setup = prepare_legacy(LegacyOptions.from_environment(os.environ), sys.argv[1:])
    except ExoKimiError as error:
        raise SystemExit(f"exo-kimi: {error}") from None
    session = _begin(setup, _say)
    sys.argv[1:] = setup.arguments
    return session


class Session:
    """What was bound in this process, and what remains to be registered once exo has a node.

    Args:
        setup: checked options.
        say: takes lines for the user.
    """

    def __init__(self, setup: LegacySetup, say: Say) -> None:
        from exo_kimi.plugin.legacy.chat_api import api_methods
        from exo_kimi.plugin.legacy.engine import engine_methods
        from exo_kimi.plugin.legacy.hook import QUIET_S, silence_of
        from exo_kimi.plugin.legacy.node import node_methods
        from exo_kimi.plugin.legacy.replies import Liveness, Replies
        from exo_kimi.plugin.legacy.stage import LegacyStage

        self._setup, self._say = setup, say
        self._bound = Bound()
        pinned, tokenizer = setup.pinned, setup.tokenizer
        self._replies = Replies(tokenizer.eos_token_id.ids, pinned.tokens)
        self._liveness = Liveness()
        self._stage = stage = LegacyStage(str(setup.directory), pinned, say=say)
        bind_card(self._bound, pinned.name, layers=pinned.layers, repo=setup.repo)
        bind_arrays(self._bound)
        bind_partition(self._bound, pinned.pieces)
        bind_engine(self._bound, lambda own: engine_methods(own, stage=stage, pinned=pinned, tokenizer=tokenizer))
        bind_node(
            self._bound,
            lambda own: node_methods(
                own,
                pinned=pinned,
                tokenizer=tokenizer,
                hidden_size=setup.config.hidden_size,
                replies=self._replies,
                say=say,
            ),
        )
        shard_of = importlib.import_module("exo.inference.shard").Shard
        bind_api(
            self._bound,
            lambda own, web: api_methods(
                own,
                name=pinned.name,
                speaker=tokenizer.speaker,
                web=web,
                shard=lambda: shard_of(pinned.name, 0, 0, pinned.layers),
                silent=lambda: silence_of(self._liveness.silent(QUIET_S)),
            ),
        )
        bind_tokenizer(
            self._bound, vars(importlib.import_module("exo.api.chatgpt_api")), setup.repo, tokenizer.of_reply
        )

    def attach(self, main: MutableMapping[str, Any]) -> None:
        """Register our callbacks.

        Args:
            main: the names of `exo.main`.
        """
        from exo_kimi.plugin.legacy.hook import Hooks

        lacking = [name for name in MAIN_NAMES if name not in main]
        hook = main.get("preemptively_load_shard")
        if lacking or tuple(inspect.signature(hook).parameters) != ("request_id", "opaque_status"):  # type: ignore[arg-type]
            self._bound.undo()
            _left_alone(
                [f"exo.main has no {', '.join(lacking)}" if lacking else "exo.main's hook is another"], self._say
            )
            return
        setup, node = self._setup, main["node"]
        pinned = setup.pinned
        first, last = pinned.range_of(node.id)
        hooks = Hooks(
            node=node,
            pinned=pinned,
            stage=self._stage,
            shard=importlib.import_module("exo.inference.shard").Shard(pinned.name, first, last, pinned.layers),
            replies=self._replies,
            liveness=self._liveness,
            queues=main["api"].token_queues,
            original=main["preemptively_load_shard"],
            say=self._say,
        )
        hooks.register()
        bind_tokenizer(self._bound, main, setup.repo, setup.tokenizer.of_reply)
        if setup.sysctl is not None:
            self._say(f"the plan counts on a raised limit here: {setup.sysctl}")
        if setup.options.api_host is not None:
            main["api"].run = functools.partial(main["api"].run, setup.options.api_host)
        node.start = _then(node.start, hooks.watch, *([hooks.preload] if setup.options.preload else []))
        own = pinned.own
        self._say(
            f"{pinned.name} by plan: " + ", ".join(f"{s.node_id} {s.start_layer}:{s.end_layer}" for s in pinned.nodes)
        )
        self._say(f"this node is {own.node_id}; its layers {own.start_layer}:{own.end_layer} are in {setup.directory}")


def _begin(setup: LegacySetup, say: Say) -> Session | None:
    rename_loader()
    if found := mismatches(NAMES):
        _left_alone(found, say)
        return None
    if setup.pinned.name in importlib.import_module("exo.models").model_cards:
        raise UsageError(
            f"exo has a model named {setup.pinned.name} already", expected="another name", fix="--name NAME"
        )
    return Session(setup, say)


def _left_alone(found: Sequence[str], say: Say) -> None:
    for line in found:
        say(line)
    say(f"exo is left as it is ({TESTED} was expected): it has no Kimi")


def _find_exo(options: LegacyOptions) -> None:
    if options.source is not None:
        if not (options.source / "exo" / "main.py").exists():
            raise UsageError(
                "no legacy exo in this folder",
                expected="a checkout with exo/main.py",
                where=options.source,
                fix="--source",
            )
        sys.path.insert(0, str(options.source.resolve()))
    try:
        importlib.import_module("exo.orchestration.node")
    except ImportError as error:
        raise ExoVersionError(
            "no legacy exo in this Python",
            expected=f"{TESTED} and its packages, in one environment with exo-kimi",
            found=str(error),
            where=sys.prefix,
            fix="--source DIR for a checkout of exo; see the README for its packages",
        ) from error


def _then(start: Callable[..., Any], *after: Callable[[], None]) -> Callable[..., Any]:
    async def started(wait_for_peers: int = 0) -> None:
        await start(wait_for_peers=wait_for_peers)
        for each in after:
            each()

    return started


def _say(line: str) -> None:
    print(f"exo-kimi: {line}", flush=True)
