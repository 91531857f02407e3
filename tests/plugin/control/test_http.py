"""The client against recorded shapes: it reads both tested versions, and says what is there when it is not exo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from exo_kimi.errors import ExoRefusedError, ExoUnreachableError, ExoVersionError
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.state import parse_state

MODEL = "lab/kimi-k2-tiny"


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> ExoClient:
    return ExoClient("studio:52415", transport=httpx.MockTransport(respond))


def test_the_state_tells_nodes_links_and_memory(make_exo: Any, client_of: Any) -> None:
    state = client_of(make_exo()).state()
    assert [(node.name, node.chip) for node in state.nodes] == [
        ("studio", "Apple M3 Ultra"),
        ("mini", "Apple M2 Ultra"),
    ]
    assert [node.available_bytes >> 30 for node in state.nodes] == [480, 171]
    assert state.sockets["a" * 32, "b" * 32] == ("169.254.1.2",)
    assert state.node("a" * 32).interfaces == {"169.254.1.1": "thunderbolt"}


@pytest.mark.parametrize(("older", "generation"), [(False, "b5375f8ce"), (True, "1.0.71")])
def test_both_tested_versions_are_told_apart(make_exo: Any, client_of: Any, older: bool, generation: str) -> None:
    assert client_of(make_exo(older=older)).state().generation == generation


def test_nodes_of_one_name_are_told_by_their_addresses(make_exo: Any, client_of: Any) -> None:
    exo = make_exo()
    exo.nodes[1].name = "studio"
    assert list(client_of(exo).state().names.values()) == ["studio-169.254.1.1", "studio-169.254.1.2"]


def test_a_node_that_is_not_measured_yet_has_no_memory() -> None:
    empty: dict[str, Any] = {"instances": {}, "runners": {}, "downloads": {}, "nodeIdentities": {}, "nodeMemory": {}}
    state = parse_state({**empty, "nodeNetwork": {}, "topology": {"nodes": ["n"], "connections": {}}}, where="here")
    assert (state.nodes[0].name, state.nodes[0].total_bytes) == ("n", 0)


def test_nobody_there_is_said_with_the_address() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(ExoUnreachableError, match=r"no exo at the address(.|\n)*http://studio:52415"):
        answering(refuse).state()


def test_an_exo_that_hangs_is_said_with_the_seconds() -> None:
    def hang(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out")

    with pytest.raises(ExoUnreachableError, match="within 15 s"):
        answering(hang).state()


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({"/healthcheck"}, "exo 0.0.x"),
        ({"/health"}, "exo-kimi serve"),
        (set(), "something that is not exo"),
    ],
)
def test_another_server_is_named(there: set[str], found: str) -> None:
    with pytest.raises(ExoVersionError, match=found):
        answering(lambda request: httpx.Response(200 if request.url.path in there else 404, json={})).state()


@pytest.mark.parametrize("key", ["topology", "runners", "nodeMemory"])
def test_a_state_without_what_is_read_is_another_exo(key: str, make_exo: Any) -> None:
    raw = make_exo()._snapshot()
    del raw[key]
    with pytest.raises(ExoVersionError, match=f"no {key}"):
        parse_state(raw, where="here")


def test_a_state_of_other_shapes_is_another_exo(make_exo: Any) -> None:
    raw = make_exo()._snapshot()
    raw["nodeMemory"]["a" * 32] = {"total": 1}
    with pytest.raises(ExoVersionError, match="ramTotal"):
        parse_state(raw, where="here")


def test_exos_own_message_reaches_the_reader(make_exo: Any, client_of: Any) -> None:
    with pytest.raises(ExoRefusedError, match="400: Failed to fetch model"):
        client_of(make_exo()).add_model("lab/kimi-k2-unknown")


def test_a_wrong_shape_is_told_with_its_place(make_exo: Any, client_of: Any) -> None:
    with pytest.raises(ExoRefusedError, match=r"422: body\.instance"):
        client_of(make_exo()).create({"MlxRingInstance": {"instanceId": "x"}})


def test_previews_carry_the_card_or_the_reason(make_exo: Any, client_of: Any) -> None:
    client = client_of(make_exo())
    client.add_model(MODEL)
    ring, jaccl, *_ = client.previews(MODEL)
    assert ring.card["modelId"] == MODEL and ring.node_ids == {"a" * 32, "b" * 32}
    assert jaccl.card is None and "RDMA" in jaccl.error


def test_deleting_what_is_not_there_is_no_error(make_exo: Any, client_of: Any) -> None:
    assert client_of(make_exo()).delete("nothing") is False


def test_an_answer_that_exo_breaks_off_is_an_error(make_exo: Any, client_of: Any) -> None:
    """exo says 200 and sends nothing when a runner dies under an answer."""
    with pytest.raises(ExoRefusedError, match="broke off"):
        client_of(make_exo(breaks_off=True)).answer(MODEL, "Hello")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(lastEventAppliedIdx=float("inf")),
        lambda state: state["topology"].update(nodes=[0, 0]),
        lambda state: state["nodeMemory"].update(
            {next(iter(state["nodeIdentities"])): {"ramTotal": {"inBytes": 1e999}}}
        ),
        lambda state: state.update(customModelCards={"a": 5}),
    ],
)
def test_a_state_of_other_types_is_an_exo_that_nobody_knows(make_exo: Any, change: Any) -> None:
    """Numbers without end and ids that are no text were tracebacks, here or later."""
    state = make_exo()._snapshot()
    change(state)
    with pytest.raises(ExoVersionError):
        parse_state(state, where="http://x")
