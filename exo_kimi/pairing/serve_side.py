"""The side where the code is typed: finds the stage that shows it, proves it, and takes or gives the cluster key."""

from __future__ import annotations

import asyncio
from typing import Any

from exo_kimi.errors import PairingError, UsageError
from exo_kimi.pairing.code import PairingCode
from exo_kimi.pairing.discovery import find_stages, nearest
from exo_kimi.pairing.exchange import MOST_BYTES, CodeExchange, decode, encode
from exo_kimi.pairing.stage_side import MESSAGE_S, Introduction
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ClusterKey


def parse_pairing(text: str) -> tuple[PairingCode, Address | None]:
    """`CODE`, or `CODE@HOST:PORT` where the stage cannot be found by itself.

    Raises:
        UsageError, AddressError: it is neither.
    """
    code, at, address = text.partition("@")
    return PairingCode.parse(code), parse_address(address, option="--pair") if at else None


def find_stage(code: PairingCode) -> Address:
    """The address of the stage that shows a code.

    Raises:
        PairingError: none is found, several show the same plate, or the one that does cannot be reached.
    """
    stages = find_stages(plate=code.plate)
    by_hand = f"give its address: --pair {code.plate}-...@HOST:PORT"
    if not stages:
        raise PairingError(
            f"no stage with the plate {code.plate} is found on this network",
            fix=f"is `exo-kimi stage --pair` running there, and does macOS allow it the local network? Or {by_hand}",
        )
    if len(stages) > 1:
        where = ", ".join(f"{stage.name} at {stage.hosts[0]}:{stage.port}" for stage in stages)
        raise PairingError(f"several stages show the plate {code.plate}", found=where, fix=by_hand)
    address = nearest(stages[0])
    if address is None:
        raise PairingError(
            "the stage is announced and cannot be reached",
            where=", ".join(f"{host}:{stages[0].port}" for host in stages[0].hosts),
            fix="firewall (macOS asks once), cable",
        )
    return address


async def pair_with(
    address: Address, code: PairingCode, *, key: ClusterKey | None, own: Introduction
) -> tuple[ClusterKey, Introduction]:
    """Prove the code to a stage; the key that both have then, and what the stage says of itself.

    Args:
        address: of the stage.
        code: as it was typed.
        key: this machine's cluster key, None where it has none.
        own: what this machine says of itself.

    Raises:
        PairingError: another code, a locked pairing, nobody there, or two machines of different clusters.
    """
    try:
        async with asyncio.timeout(MESSAGE_S):
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=MOST_BYTES)
    except (OSError, TimeoutError) as error:
        raise PairingError(
            "no stage answers there", found=error, where=address, fix="start `exo-kimi stage --pair` on that machine"
        ) from error
    try:
        exchange = CodeExchange(code, "serve")
        answer = await _ask(reader, writer, {"spake": exchange.message})
        keys = exchange.finish(answer.get("spake"))
        answer = await _ask(reader, writer, {"proof": keys.proof()})
        if not keys.is_proof(answer.get("proof")):
            raise PairingError(
                "what answers there does not know the code",
                where=address,
                fix="it may be another machine than you mean",
            )
        theirs = keys.unseal("stage", answer.get("sealed"))
        try:
            chosen = _common_key(key, theirs.get("key"))
        except UsageError as error:
            writer.write(encode({"sealed": keys.seal("serve", {"error": error.what})}))
            await writer.drain()
            raise
        mine = {"id": own.id, "name": own.name, "key": chosen.secret.decode()}
        answer = await _ask(reader, writer, {"sealed": keys.seal("serve", mine)})
        keys.unseal("done", answer.get("sealed"))
        return chosen, Introduction.read(theirs)
    except (OSError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
        raise PairingError("the pairing was cut off", found=error, where=address, fix="try it again") from error
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: dict[str, Any]) -> Any:
    writer.write(encode(message))
    async with asyncio.timeout(MESSAGE_S):
        await writer.drain()
        line = await reader.readline()
    if not line:
        raise ConnectionError("the other side went away")
    return decode(line)


def _common_key(mine: ClusterKey | None, theirs: object) -> ClusterKey:
    """The key of the one that has one; a new one where neither has.

    Raises:
        UsageError: they have different ones.
    """
    if theirs is None:
        return mine or ClusterKey.generate()
    other = ClusterKey.from_text(str(theirs), where="the pairing")
    if mine is not None and mine.secret != other.secret:
        raise UsageError(
            "both machines have a cluster key, and not the same",
            fix="the one that joins forgets its own first: `exo-kimi cluster forget`",
        )
    return other
