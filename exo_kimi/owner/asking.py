"""A server asked for what it says of itself, /health and /metrics, and why there is no answer, in words."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import msgspec

from exo_kimi.errors import UsageError
from exo_kimi.runtime.protocol.versions import Versions

DEFAULT_URL = "http://127.0.0.1:52415"
ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerToAsk:
    """A server, and the key that it wants."""

    url: str
    key: str | None = None


class StageWords(msgspec.Struct, frozen=True, kw_only=True):
    """What /health says of a stage, as far as it is shown."""

    stage: int
    state: str
    start_layer: int
    end_layer: int
    loading_progress: float = 0.0
    weights_bytes: int = 0
    kv_bytes: int = 0
    silent_s: float = 0.0
    restarts: int = 0
    last_error: str | None = None


class HealthWords(msgspec.Struct, frozen=True, kw_only=True):
    """What /health says; without the key no more than `status`."""

    status: str
    reason: str | None = None
    model: str = ""
    version: str | None = None
    stages: tuple[StageWords, ...] | None = None
    requests: dict[str, int] = msgspec.field(default_factory=dict)
    context: int = 0
    kv_capacity_tokens: int = 0
    kv_reserved_tokens: int = 0
    events: tuple[str, ...] = ()


class _AnyVersion(msgspec.Struct):
    """What can be read of any version's /health."""

    status: str
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAnswer:
    """Why a server tells nothing."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAnswer:
    """What a server said: /health as it came and as it was read, and /metrics ("" where it wants a key)."""

    health_json: bytes
    health: HealthWords
    metrics: str


def server_at(url: str | None, key: str | None) -> ServerToAsk:
    """The server of an address, as a user writes it: `http://` may be missing.

    Raises:
        UsageError: it is none.
    """
    text = url or DEFAULT_URL
    text = text if "://" in text else f"http://{text}"
    try:
        found = httpx.URL(text)
        known = found.scheme in ("http", "https") and bool(found.host)
    except httpx.InvalidURL:
        known = False
    if not known:
        raise UsageError("not a server's address", expected="http://HOST:PORT", found=url, where="--url")
    return ServerToAsk(url=text.rstrip("/"), key=key)


def ask_server(server: ServerToAsk) -> ServerAnswer | NoAnswer:
    """One look at a server."""
    headers = {"authorization": f"Bearer {server.key}"} if server.key else {}
    try:
        with httpx.Client(base_url=server.url, headers=headers, timeout=ANSWER_S, trust_env=False) as client:
            health, metrics = client.get("/health"), client.get("/metrics")
    except httpx.HTTPError as error:
        return NoAnswer(reason=_reason(error))
    try:
        words = msgspec.json.decode(health.content, type=HealthWords)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return NoAnswer(reason=_other_words(health))
    return ServerAnswer(
        health_json=health.content, health=words, metrics=metrics.text if metrics.status_code == 200 else ""
    )


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"it says nothing for {ANSWER_S:g} s: asleep, frozen, cut off, or no HTTP server"
    if isinstance(error, httpx.ConnectError):
        return f"it cannot be reached ({str(error) or 'no connection'}): is it started, and the port right?"
    return "what listens there is no HTTP server: a stage's port, or another program's"


def _other_words(health: httpx.Response) -> str:
    try:
        found = msgspec.json.decode(health.content, type=_AnyVersion)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return f"another program answers there (status {health.status_code} for /health)"
    mine = Versions.installed().exo_kimi
    return f"it is {found.status!r}, of another version ({found.version or 'unknown'}, this is {mine}), and tells it otherwise"
