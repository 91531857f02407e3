"""Only names of this server are answered to, so that no web page reaches it through a name of its own."""

from __future__ import annotations

import pytest

from exo_kimi.serve.gate import allowed_hosts, host_name

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = ("/health", "/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing")


@pytest.mark.parametrize("header", ["host", "origin"])
@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:52415", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"]
)
async def test_a_foreign_name_is_refused_everywhere_with_the_way_out(saying, client_of, header, name):
    engine = saying()
    async with client_of(engine, hosts=allowed_hosts("127.0.0.1")) as client:
        client.headers["host"] = "localhost"
        client.headers[header] = f"http://{name}" if header == "origin" else name
        answers = [await client.get(path) for path in PATHS] + [await client.post(CHAT, json=ASK)]
    for answer in answers:
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert name in error["message"]
        assert "--allowed-host" in error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    "value", ["null", "http://a@localhost", "http://localhost/x", "http://localhost:x", "", "file://"]
)
async def test_an_origin_that_names_no_host_is_refused(saying, client_of, value):
    async with client_of(saying(), hosts=allowed_hosts("127.0.0.1")) as client:
        headers = {"host": "localhost", "origin": value}
        assert (await client.get("/health", headers=headers)).status_code == 403


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:52415", "127.0.0.1:80", "[::1]:52415", "kimi.home", "Kimi.Home.:8"]
)
async def test_names_of_this_server_are_answered_to(saying, client_of, name):
    async with client_of(saying(), hosts=allowed_hosts("127.0.0.1", ["kimi.home"])) as client:
        for headers in ({"host": name}, {"host": name, "origin": f"http://{name}"}):
            assert (await client.post(CHAT, json=ASK, headers=headers)).status_code == 200


async def test_a_server_on_every_interface_answers_to_addresses_and_a_star_to_all(saying, client_of):
    for bound, extra, name, status in (
        ("0.0.0.0", (), "192.168.2.1:52415", 200),
        ("::", (), "[fe80::1]:52415", 200),
        ("0.0.0.0", (), "evil.example", 403),
        ("192.168.2.1", (), "192.168.2.1", 200),
        ("192.168.2.1", (), "192.168.2.2", 403),
        ("127.0.0.1", ("*",), "evil.example", 200),
        ("mac.local", (), "mac.local", 200),
    ):
        async with client_of(saying(), hosts=allowed_hosts(bound, extra)) as client:
            assert (await client.get("/health", headers={"host": name})).status_code == status, (bound, name)


def test_host_names_are_read_without_port_and_brackets():
    assert [host_name(url) for url in ("http://A.b:1", "//[::1]:2", "null", "//x:y", "https://u@h")] == [
        "a.b",
        "::1",
        None,
        None,
        None,
    ]
