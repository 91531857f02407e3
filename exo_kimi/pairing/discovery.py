"""Stages on the local network by Bonjour (multicast DNS), through the zeroconf library.

What is announced is public: a machine's id and name, its address, and while it waits for a pairing the two digits of its plate.
Nobody is trusted for what he announces: a wrong machine fails the exchange of the pairing, or the handshake of the link.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ifaddr
from zeroconf import Error as zeroconf_error
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from exo_kimi.errors import PairingError
from exo_kimi.runtime.transport.address import Address

SERVICE = "_exo-kimi._tcp.local."
FIND_S = 5.0
GATHER_S = 0.5  # after the first that fits: another one may answer, and then nobody knows which is meant
PROBE_S = 1.0
PROBES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedStage:
    """A stage that says where it is. `plate` is empty unless it waits for a pairing."""

    id: str
    name: str
    plate: str
    hosts: tuple[str, ...]
    port: int


@contextmanager
def announced(id: str, name: str, address: Address, *, plate: str = "") -> Iterator[bool]:
    """Announce a stage while the context is open; False where the network takes no announcement, which is no error."""
    hosts = _own_hosts() if address.is_wildcard else [address.host]
    properties = {"id": id, "name": name, "plate": plate}
    try:
        zeroconf = Zeroconf(ip_version=IPVersion.V4Only)
    except OSError:
        yield False
        return
    try:
        info = ServiceInfo(
            SERVICE,
            f"{id}.{SERVICE}",
            port=address.port,
            properties=properties,
            parsed_addresses=hosts,
            server=f"{id}.local.",
        )
        try:
            zeroconf.register_service(info, allow_name_change=False)
        except (zeroconf_error, OSError):
            yield False
            return
        yield True
    finally:
        zeroconf.close()


def find_stages(
    *, plate: str | None = None, id: str | None = None, find_s: float | None = None
) -> list[AnnouncedStage]:
    """Stages that fit, waiting a little for further ones once one was found.

    Args:
        plate: of the pairing that they wait for.
        id: of the machine.
        find_s: how long to look.

    Raises:
        PairingError: this machine has no network to look in.
    """
    found: dict[str, AnnouncedStage] = {}

    def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, timeout=1500)
        stage = None if info is None else _read(info)
        if stage is not None and (plate is None or stage.plate == plate) and (id is None or stage.id == id):
            found[name] = stage

    try:
        zeroconf = Zeroconf(ip_version=IPVersion.V4Only)
    except OSError as error:
        raise PairingError(
            "cannot look for machines on this network",
            found=error.strerror,
            fix="give the address: --pair CODE@HOST:PORT",
        ) from error
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[on_change])
        until_s = time.monotonic() + (FIND_S if find_s is None else find_s)
        while not found and time.monotonic() < until_s:
            time.sleep(0.05)
        if found:
            time.sleep(GATHER_S)
        browser.cancel()
    finally:
        zeroconf.close()
    return list(found.values())


def nearest(stage: AnnouncedStage) -> Address | None:
    """The address of a stage that answers soonest, which over Thunderbolt is the cable; None where none answers."""
    times: dict[str, float] = {}
    for host in stage.hosts:
        for _ in range(PROBES):
            began_s = time.monotonic()
            try:
                socket.create_connection((host, stage.port), timeout=PROBE_S).close()
            except OSError:
                break
            times[host] = min(times.get(host, PROBE_S), time.monotonic() - began_s)
    return Address(min(times, key=lambda host: times[host]), stage.port) if times else None


def answers(address: Address) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address.host, address.port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def _read(info: ServiceInfo) -> AnnouncedStage | None:
    fields = {
        key.decode(errors="replace"): (value or b"").decode(errors="replace") for key, value in info.properties.items()
    }
    hosts = tuple(info.parsed_addresses(IPVersion.V4Only))
    if not hosts or not info.port or not fields.get("id"):
        return None
    return AnnouncedStage(
        id=fields["id"], name=fields.get("name", ""), plate=fields.get("plate", ""), hosts=hosts, port=info.port
    )


def _own_hosts() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    hosts = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    return [host for host in hosts if not host.startswith("127.")] or ["127.0.0.1"]
