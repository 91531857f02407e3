"""The pairing's messages: one code gives one key, other codes give nothing, and a record of it gives nothing either."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spake2.ed25519_basic import Element, bytes_to_element
from spake2.parameters.ed25519 import ParamsEd25519
from spake2.spake2 import finalize_SPAKE2

from exo_kimi.errors import PairingError, UsageError
from exo_kimi.pairing import stage_side
from exo_kimi.pairing.code import PairingCode
from exo_kimi.pairing.exchange import CodeExchange, PairedKeys, decode, encode
from exo_kimi.pairing.serve_side import pair_with, parse_pairing
from exo_kimi.pairing.stage_side import Introduction, PairingListener
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey

CODE = PairingCode("42", "19370581")
WRONG = PairingCode("42", "19370582")
STAGE, SERVE = Introduction(id="aa", name="mini"), Introduction(id="bb", name="studio")
Talk = Callable[[Address], Awaitable[Any]]


async def paired(key: ClusterKey | None, talk: Talk) -> tuple[Any, Any]:
    """What a stage that shows CODE ends with, and what a talk with it gives; errors as they are."""
    listener = PairingListener(CODE, key, STAGE)
    server = await listener.open(Address("127.0.0.1", 0))
    waiting = asyncio.create_task(listener.wait(server))
    said = await asyncio.gather(talk(Address("127.0.0.1", server.sockets[0].getsockname()[1])), return_exceptions=True)
    if not waiting.done():
        await asyncio.wait([waiting], timeout=0.2)
    if not waiting.done():
        waiting.cancel()
        return None, said[0]
    return waiting.exception() or waiting.result(), said[0]


def serve_with(code: PairingCode, key: ClusterKey | None = None) -> Talk:
    return lambda address: pair_with(address, code, key=key, own=SERVE)


@pytest.mark.parametrize("stage_has", [True, False])
@pytest.mark.parametrize("serve_has", [True, False])
def test_one_code_makes_one_cluster(stage_has: bool, serve_has: bool) -> None:
    key = ClusterKey.generate()
    stage, serve = asyncio.run(paired(key if stage_has else None, serve_with(CODE, key if serve_has else None)))
    assert stage[0].secret == serve[0].secret
    assert (stage[1], serve[1]) == (SERVE, STAGE)
    if stage_has or serve_has:
        assert stage[0] == key


def test_machines_of_two_clusters_stay_as_they_are() -> None:
    stage, serve = asyncio.run(paired(ClusterKey.generate(), serve_with(CODE, ClusterKey.generate())))
    assert stage is None and isinstance(serve, UsageError)
    assert "cluster forget" in str(serve)


def test_a_wrong_code_gets_nothing_and_three_lock_it() -> None:
    async def try_all(address: Address) -> list[Any]:
        tries = [pair_with(address, code, key=None, own=SERVE) for code in (WRONG, WRONG, WRONG, CODE)]
        return [(await asyncio.gather(each, return_exceptions=True))[0] for each in tries]

    stage, tried = asyncio.run(paired(ClusterKey.generate(), try_all))
    assert [type(each) for each in tried] == [PairingError] * 4
    assert "2 more wrong" in str(tried[0]) and "1 more wrong" in str(tried[1])
    assert "locked" in str(tried[2])
    assert isinstance(stage, PairingError) and "a wrong code came 3 times" in str(stage)


def test_wrong_codes_at_the_same_time_are_counted_together() -> None:
    """Ten at once have three tries, not ten."""
    proofs: list[int] = []
    is_proof = PairedKeys.is_proof

    def counted(self: PairedKeys, text: object) -> bool:
        proofs.append(1)
        return is_proof(self, text)

    async def try_all(address: Address) -> list[Any]:
        return await asyncio.gather(
            *(pair_with(address, WRONG, key=None, own=SERVE) for _ in range(10)), return_exceptions=True
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairedKeys, "is_proof", counted)
        stage, tried = asyncio.run(paired(ClusterKey.generate(), try_all))
    assert isinstance(stage, PairingError) and all(isinstance(each, PairingError) for each in tried)
    assert len(proofs) == 3


def test_two_wrong_then_the_right_one_pairs() -> None:
    async def try_all(address: Address) -> Any:
        for _ in range(2):
            with pytest.raises(PairingError, match="another one than the stage shows"):
                await pair_with(address, WRONG, key=None, own=SERVE)
        return await pair_with(address, CODE, key=None, own=SERVE)

    stage, serve = asyncio.run(paired(None, try_all))
    assert stage[0] == serve[0]


def test_a_replayed_pairing_is_a_wrong_code() -> None:
    """What the serving machine sent is sent again, to the same code."""
    sent = [line for who, line in recorded() if who == "serve"]

    async def replay(address: Address) -> list[bytes]:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        answers = []
        for line in sent:
            writer.write(line)
            answers.append(await reader.readline())
        writer.close()
        return answers

    stage, answers = asyncio.run(paired(ClusterKey.generate(), replay))
    assert stage is None
    assert "error" in json.loads(answers[1]) and answers[2] == b""
    assert b"sealed" not in b"".join(answers) and b"proof" not in b"".join(answers)


def test_an_impostor_without_the_code_gets_no_key_from_who_typed_it() -> None:
    """A machine that shows the same plate and does not know the code."""

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = CodeExchange(WRONG, "stage")
        first = decode(await reader.readline())
        keys = exchange.finish(first["spake"])
        writer.write(encode({"spake": exchange.message}))
        heard.append(await reader.readline())
        writer.write(encode({"proof": keys.proof(), "sealed": keys.seal("stage", {"key": None})}))
        heard.append(await reader.readline())
        writer.close()
        gone.set()

    async def run() -> None:
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(PairingError, match="does not know the code"):
            await pair_with(address, CODE, key=ClusterKey.generate(), own=SERVE)
        await asyncio.wait_for(gone.wait(), 5)
        server.close()

    gone = asyncio.Event()
    heard: list[bytes] = []
    asyncio.run(run())
    assert heard[1] == b"" and "sealed" not in json.loads(heard[0])


def test_a_record_cannot_be_searched_for_the_code() -> None:
    """Everything that a listener can compute from a record and a guessed code, for a small space of codes with the right one.

    The same search finds the code at once where a proof is made of it and of what was sent, as without a PAKE.
    """
    lines = [json.loads(line) for _, line in recorded()]
    first, second, proof = bytes.fromhex(lines[0]["spake"]), bytes.fromhex(lines[1]["spake"]), lines[2]["proof"]
    naive = hmac.new(CODE.secret.encode(), first + second, hashlib.sha256).hexdigest()
    space = [f"{number:08d}" for number in range(19370560, 19370600)]
    assert CODE.secret in space
    for secret in space:
        for key in keys_of_a_listener(first, second, secret):
            assert proof_of(key, first, second) != proof
    guesses = {secret: hmac.new(secret.encode(), first + second, hashlib.sha256).hexdigest() for secret in space}
    assert [secret for secret, guess in guesses.items() if guess == naive] == [CODE.secret]


def test_with_a_private_scalar_the_record_opens() -> None:
    """The search above computes keys rightly: what it lacks is the one number that never leaves a machine."""
    one, other = CodeExchange(CODE, "serve"), CodeExchange(CODE, "stage")
    first, second = bytes.fromhex(one.message), bytes.fromhex(other.message)
    proof = other.finish(one.message).proof()
    assert one.finish(other.message).is_proof(proof)
    group, n = ParamsEd25519.group, ParamsEd25519.N
    scalar = group.password_to_scalar(CODE.secret.encode())
    shared = bytes_to_element(second[1:]).add(n.scalarmult(-scalar)).scalarmult(one._spake.xy_scalar)
    key = key_of(first, second, CODE.secret, shared)
    assert PairedKeys("stage", key, hashlib.sha256(first + second).digest()).proof() == proof


def test_nothing_readable_of_the_key_is_in_a_record() -> None:
    key = ClusterKey.generate()
    record = b"".join(line for _, line in recorded(key))
    assert key.secret not in record and CODE.secret.encode() not in record
    assert b"mini" not in record and b"studio" not in record


@given(st.binary(max_size=200) | st.dictionaries(st.text(max_size=8), st.none() | st.text(max_size=80)).map(encode))
def test_any_other_bytes_are_an_error_by_name(line: bytes) -> None:
    try:
        CodeExchange(CODE, "stage").finish(decode(line).get("spake"))
    except PairingError:
        return
    raise AssertionError("taken")


def test_strangers_and_idlers_do_not_end_a_pairing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_side, "MESSAGE_S", 0.1)

    async def talk(address: Address) -> Any:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9000, b"{}\n"):
            _, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(data)
            await asyncio.sleep(0.15)
            writer.close()
        return await pair_with(address, CODE, key=None, own=SERVE)

    stage, serve = asyncio.run(paired(None, talk))
    assert stage[0] == serve[0]


def test_nobody_came_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_side, "OPEN_S", 0.05)
    stage, _ = asyncio.run(paired(None, lambda address: asyncio.sleep(0)))
    assert isinstance(stage, PairingError) and "nobody paired" in str(stage)


@pytest.mark.parametrize("text", ["42-1937-0581", "4219370581", " 42 1937 0581 "])
def test_a_code_is_read_as_it_is_typed(text: str) -> None:
    assert PairingCode.parse(text) == CODE
    assert str(CODE) == "42-1937-0581" and "0581" not in repr(CODE)
    assert parse_pairing(f"{CODE}@192.168.2.2:52500") == (CODE, Address("192.168.2.2", 52500))


@pytest.mark.parametrize("text", ["", "42-1937-058", "42-1937-05812", "a2-1937-0581", "42-1937-0581@"])
def test_other_texts_are_no_codes(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_pairing(text)
    assert "1937" not in str(error.value.found)


def test_generated_codes_are_codes() -> None:
    codes = {str(PairingCode.generate()) for _ in range(50)}
    assert len(codes) == 50 and all(str(PairingCode.parse(code)) == code for code in codes)


def recorded(key: ClusterKey | None = None) -> list[tuple[str, bytes]]:
    """Who sent which line in a pairing with CODE, as a listener on the wire has it."""
    lines: list[tuple[str, bytes]] = []

    async def talk(address: Address) -> Any:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(address.host, address.port)
            for who, source, target in (("serve", reader, there_writer), ("stage", there_reader, writer)) * 3:
                line = await source.readline()
                lines.append((who, line))
                target.write(line)
            there_writer.close()
            writer.close()

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        between = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            return await pair_with(between, CODE, key=None, own=SERVE)
        finally:
            server.close()

    stage, serve = asyncio.run(paired(key or ClusterKey.generate(), talk))
    assert stage[0] == serve[0] and len(lines) == 6
    return lines


def keys_of_a_listener(first: bytes, second: bytes, secret: str) -> Iterator[bytes]:
    """SPAKE2's key for each group element that can be made of the two messages and a guess, without a private scalar."""
    group, m, n = ParamsEd25519.group, ParamsEd25519.M, ParamsEd25519.N
    scalar = group.password_to_scalar(secret.encode())
    x = bytes_to_element(first[1:]).add(m.scalarmult(-scalar))
    y = bytes_to_element(second[1:]).add(n.scalarmult(-scalar))
    shared: list[Element] = [
        x,
        y,
        x.add(y),
        x.scalarmult(scalar),
        y.scalarmult(scalar),
        m.scalarmult(scalar),
        group.Base,
    ]
    for element in shared:
        yield key_of(first, second, secret, element)


def key_of(first: bytes, second: bytes, secret: str, shared: Element) -> bytes:
    names = b"exo-kimi serve", b"exo-kimi stage 42"
    return finalize_SPAKE2(*names, first[1:], second[1:], shared.to_bytes(), secret.encode())


def proof_of(key: bytes, first: bytes, second: bytes) -> str:
    return PairedKeys("serve", key, hashlib.sha256(first + second).digest()).proof()
