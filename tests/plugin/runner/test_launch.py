"""What is bound in exo, and that an exo which differs is left as it is; with modules in exo's shape instead of exo."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import exo_kimi.exo
from exo_kimi.errors import ExoVersionError
from exo_kimi.plugin.bindings import HEAD, V71, Name, mismatches, nearest
from exo_kimi.plugin.runner import launch
from exo_kimi.plugin.runner.options import EngineOptions


def _exo_entrypoint(
    bound_instance: Any, event_sender: Any, task_receiver: Any, cancel_receiver: Any, _logger: Any
) -> None:
    """As exo's."""


def _exo_plan(
    node_id: Any,
    runners: Any,
    global_download_status: Any,
    instances: Any,
    all_runners: Any,
    tasks: Any,
    input_chunk_buffer: Any,
    image_cache: Any,
    instance_backoff: Any,
    download_backoff: Any,
) -> Any:
    return tasks.get("planned")


class CancelTask(SimpleNamespace):
    """As exo's."""

    model_fields = dict.fromkeys(("instance_id", "cancelled_task_id", "runner_id"))


def exo_cards() -> dict[str, Any]:
    """As exo's model cards, new ones for every test."""

    class ModelCard(SimpleNamespace):
        model_fields = dict.fromkeys(("model_id", "family", "context_length", "sampling_defaults"))

        @staticmethod
        async def fetch_from_hf(model_id: Any) -> Any:
            """As exo's."""

    class _CardCache:
        async def refresh(self) -> None:
            """As exo's."""

    return {"ModelCard": ModelCard, "_CardCache": _CardCache}


async def _refresh_card_cache() -> None:
    """As v1.0.71's."""


def exo_api() -> type:
    """As exo's API class, a new one for every test."""

    class API:
        def _setup_exception_handlers(self) -> None:
            """As exo's."""

        def _setup_routes(self) -> None:
            """As exo's."""

        def reset(self, result_clock: Any, event_receiver: Any) -> None:
            """As exo's, which forgets the queues of its answers."""
            self._text_generation_queues: dict[str, Any] = {}
            self._image_generation_queues: dict[str, Any] = {}

        async def _send_text_generation_with_images(self, task_params: Any) -> Any:
            """As exo's."""

        def _token_chunk_stream(self, command_id: Any) -> Any:
            """As exo's."""

        async def get_models(self, status: Any = None) -> Any:
            """As exo's."""

        async def ollama_show(self, request: Any) -> Any:
            """As exo's."""

    return API


class TextGeneration(SimpleNamespace):
    """As exo's."""


class KeyedBackoff:
    """As exo's, which counts starts."""

    def __init__(self) -> None:
        self.counted: dict[str, int] = {}

    def attempts(self, key: str) -> int:
        return self.counted.get(key, 0)

    def reset(self, key: str) -> None:
        self.counted.pop(key, None)


@pytest.fixture
def exo(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules that have what a node's process needs of exo b5375f8ce."""
    called: list[list[str]] = []

    def main() -> None:
        called.append(list(sys.argv))

    contents: dict[str, dict[str, Any]] = {
        "exo": {},
        "exo.api": {},
        "exo.api.main": {"API": exo_api()},
        "exo.main": {"main": main},
        "exo.worker": {},
        "exo.worker.main": {"plan": _exo_plan},
        "exo.worker.runner": {},
        "exo.worker.runner.bootstrap": {"entrypoint": _exo_entrypoint},
        "exo.worker.runner.supervisor": {"entrypoint": _exo_entrypoint},
        "exo.utils": {},
        "exo.utils.keyed_backoff": {"KeyedBackoff": KeyedBackoff},
        "exo.shared": {},
        "exo.shared.models": {},
        "exo.shared.models.model_cards": exo_cards(),
        "exo.shared.types": {},
        "exo.shared.types.tasks": {"CancelTask": CancelTask},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["exo-kimi"])
    for name in ("EXO_KIMI_CONTEXT", "EXO_KIMI_KV_BYTES", "EXO_KIMI_PREFIX_CACHE_BYTES"):
        monkeypatch.setenv(name, "1")  # so that it is as before when the test is over
        monkeypatch.delenv(name)
    return SimpleNamespace(
        supervisor=sys.modules["exo.worker.runner.supervisor"],
        worker=sys.modules["exo.worker.main"],
        api=contents["exo.api.main"]["API"],
        cards=sys.modules["exo.shared.models.model_cards"],
        called=called,
    )


def test_our_names_are_bound_and_exo_is_started_with_its_own_arguments(exo: SimpleNamespace) -> None:
    said: list[str] = []
    launch.run(["--api-port", "52415"], say=said.append)
    assert exo.supervisor.entrypoint is launch.entrypoint
    assert exo.worker.plan.__wrapped__ is _exo_plan
    names = (
        "_setup_exception_handlers",
        "_setup_routes",
        "_send_text_generation_with_images",
        "_token_chunk_stream",
        "get_models",
    )
    assert all(hasattr(getattr(exo.api, name), "__wrapped__") for name in names)
    assert hasattr(exo.cards.ModelCard.fetch_from_hf, "__wrapped__")
    assert hasattr(exo.cards._CardCache.refresh, "__wrapped__")
    assert exo.called == [["exo", "--api-port", "52415"]]
    assert said == ["exo-kimi: Kimi models run on exo-kimi's engine (exo b5375f8ce)"]


def test_answers_in_progress_end_when_exos_api_begins_anew(exo: SimpleNamespace) -> None:
    launch.bind()
    api, closed = exo.api(), []
    api._text_generation_queues = {"a": SimpleNamespace(close=lambda: closed.append("a"))}
    api._image_generation_queues = {"b": SimpleNamespace(close=lambda: closed.append("b"))}
    api.reset(1, None)
    assert closed == ["a", "b"] and api._text_generation_queues == {}


def test_the_door_binds_as_run_does(exo: SimpleNamespace) -> None:
    said: list[str] = []
    exo_kimi.exo.install(said.append)
    assert exo.supervisor.entrypoint is launch.entrypoint
    assert said == ["exo-kimi: Kimi models run on exo-kimi's engine (exo b5375f8ce)"]


def test_v1_0_71_is_bound_where_its_runners_are(exo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "exo.worker.runner.supervisor", None)
    assert nearest() is HEAD  # which the error is then about
    old = ModuleType("exo.worker.runner.runner_supervisor")
    vars(old)["entrypoint"] = _exo_entrypoint
    monkeypatch.setitem(sys.modules, old.__name__, old)
    old_names = {"get_card": lambda model_id: None, "add_to_card_cache": lambda card: None}
    vars(exo.cards).update(old_names, _refresh_card_cache=_refresh_card_cache)
    said: list[str] = []
    launch.run([], say=said.append)
    assert nearest() is V71 and vars(old)["entrypoint"] is launch.entrypoint
    assert exo.cards._refresh_card_cache.__wrapped__ is _refresh_card_cache
    assert said == ["exo-kimi: Kimi models run on exo-kimi's engine (exo v1.0.71)"]


def test_options_are_handed_on_to_runners(exo: SimpleNamespace) -> None:
    options = EngineOptions(context=4096, kv_bytes=10**9, prefix_cache_bytes=0)
    launch.run([], options=options, say=lambda _: None)
    assert EngineOptions.from_environment() == options


def test_what_our_engine_lacks_is_said_and_exo_is_left_as_it_is(
    exo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXO_KIMI_CONTEXT", "much")
    (told,) = launch.bind()
    assert "EXO_KIMI_CONTEXT" in told and exo.supervisor.entrypoint is _exo_entrypoint
    monkeypatch.delenv("EXO_KIMI_CONTEXT")
    monkeypatch.setattr(launch, "_PACKAGES", {"no_such_module": "no-such-package"})
    assert launch.bind() == ("exo's environment lacks no-such-package, which exo-kimi needs",)


def test_binding_twice_wraps_once(exo: SimpleNamespace) -> None:
    launch.bind()
    launch.bind()
    assert exo.worker.plan.__wrapped__ is _exo_plan
    assert not hasattr(exo.api._token_chunk_stream.__wrapped__, "__wrapped__")


def test_another_signature_is_said_and_exo_is_left_as_it_is(exo: SimpleNamespace) -> None:
    def other(bound_instance: Any, event_sender: Any) -> None:
        """A later exo's."""

    exo.supervisor.entrypoint = other
    said: list[str] = []
    launch.run([], say=said.append)
    assert exo.supervisor.entrypoint is other and exo.worker.plan is _exo_plan
    assert "exo.worker.runner.supervisor.entrypoint takes (bound_instance, event_sender), not" in said[0]
    assert said[-1] == "exo-kimi: exo is left as it is; its own engine runs every model"
    assert exo.called == [["exo"]]


def test_without_exo_the_error_says_how_to_install_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "exo.main", None)
    with pytest.raises(ExoVersionError, match="uv run exo-kimi exo run"):
        launch.run([])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (Name(module="m", name="gone"), "m.gone does not exist"),
        (Name(module="m", name="f", parameters=("a",)), "m.f takes (a, b), not (a)"),
        (Name(module="m", name="f", parameters=("a", "b")), None),
        (Name(module="m", name="Base", abstract=("run", "stop")), "m.Base wants run, not run, stop"),
        (Name(module="m", name="Base", abstract=("run",)), None),
        (Name(module="m", name="Model", fields=("x", "y")), "m.Model has no y"),
    ],
)
def test_a_name_that_differs_is_told(name: Name, found: str | None) -> None:
    module = SimpleNamespace(
        f=lambda a, b: None,
        Base=type("Base", (), {"__abstractmethods__": frozenset({"run"})}),
        Model=type("Model", (), {"model_fields": {"x": 1}}),
    )
    assert mismatches([name], lambda _: module) == (() if found is None else (found,))


def test_a_module_that_is_gone_is_told_for_every_name() -> None:
    def find(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    names = [*HEAD.node_names, *HEAD.runner_names]
    told = mismatches(names, find)
    assert len(told) == len(names)
    assert all("cannot be imported" in each for each in told)
