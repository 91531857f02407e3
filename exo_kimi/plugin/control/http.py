"""The HTTP client of a running exo 1.x: typed, version-checked, every failure a clear error.

exo has no login and validates almost nothing, so what is sent is checked before it comes here (`exo_place`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import httpx

from exo_kimi.errors import ExoRefusedError, ExoUnreachableError, ExoVersionError
from exo_kimi.plugin.api.engine_route import NodeEngine, ask_engine
from exo_kimi.plugin.control.model_card import Card
from exo_kimi.plugin.control.state import ClusterState, parse_state

DEFAULT_URL = "http://127.0.0.1:52415"
_TIMEOUT_S = 15.0
_ANSWER_S = 300.0  # a first answer of a large model reads half a terabyte
_FETCH_S = 120.0  # exo asks the model's public repository before it trusts its own directory

Sharding = Literal["Pipeline", "Tensor"]
Meta = Literal["MlxRing", "MlxJaccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What exo would place: a whole instance as JSON, or why not."""

    sharding: str
    meta: str
    instance: Mapping[str, Any] | None
    error: str

    @property
    def node_ids(self) -> frozenset[str]:
        """Nodes of the instance."""
        return frozenset(self._assigned.get("nodeToRunner", {}))

    @property
    def card(self) -> Card | None:
        """The model's full card."""
        for shard in self._assigned.get("runnerToShard", {}).values():
            return dict(next(iter(shard.values()))["modelCard"])
        return None

    @property
    def _assigned(self) -> Mapping[str, Any]:
        if self.instance is None:
            return {}
        body: Mapping[str, Any] = next(iter(self.instance.values()))["shardAssignments"]
        return body


class ExoClient:
    """One exo node's API; any node of a cluster answers for all.

    Args:
        url: such as `http://127.0.0.1:52415`.
        transport: for tests.
    """

    def __init__(self, url: str = DEFAULT_URL, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = (url if "//" in url else f"http://{url}").rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT_S, transport=transport, trust_env=False)

    def __enter__(self) -> ExoClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def state(self) -> ClusterState:
        """The whole cluster, now.

        Raises:
            ExoUnreachableError: nobody answers.
            ExoVersionError: who answers is not exo 1.x.
        """
        response = self._send("GET", "/state")
        if response.status_code == 404:
            raise self._not_exo()
        return parse_state(self._json(response), where=self.url)

    def engine(self, url: str = "") -> NodeEngine:
        """Which engine a node's Kimis run on.

        Args:
            url: of another node's API; empty for this one's.
        """
        return ask_engine(self._http, url)

    def url_of(self, address: str) -> str:
        """The API of another node of this cluster: exo presumes that all have the same port.

        Args:
            address: an IP address.
        """
        return str(self._http.base_url.copy_with(host=address)).rstrip("/")

    def node_id(self) -> str:
        """The id of the node that answers."""
        return str(self._json(self._send("GET", "/node_id")))

    def previews(self, model_id: str, node_ids: Sequence[str] = ()) -> tuple[Preview, ...]:
        """What exo would place for a model, over at least these nodes.

        Raises:
            ExoRefusedError: exo has no card of the model and cannot make one.
        """
        params = [("model_id", model_id), *(("node_ids", node_id) for node_id in node_ids)]
        body = self._json(self._send("GET", "/instance/previews", params=params, timeout_s=_FETCH_S))
        return tuple(
            Preview(
                sharding=entry["sharding"],
                meta=entry["instance_meta"],
                instance=entry["instance"],
                error=str(entry.get("error") or ""),
            )
            for entry in body["previews"]
        )

    def model_ids(self) -> frozenset[str]:
        """Every model that exo has a card of."""
        return frozenset(str(entry["id"]) for entry in self._json(self._send("GET", "/models"))["data"])

    def add_model(self, model_id: str) -> None:
        """Have exo make a card from the model's directory, for all nodes.

        Raises:
            ExoRefusedError: it has neither the directory nor a way to the model's repository.
        """
        self._json(self._send("POST", "/models/add", json={"model_id": model_id}, timeout_s=_FETCH_S))

    def create(self, instance: Mapping[str, Any]) -> None:
        """Ask for an instance; exo answers before anything has happened.

        Raises:
            ExoRefusedError: wrong shape, or the model is larger than all free memory together.
        """
        self._json(self._send("POST", "/instance", json={"instance": instance}))

    def delete(self, instance_id: str) -> bool:
        """Ask for the end of an instance; False when there is none of that id."""
        response = self._send("DELETE", f"/instance/{instance_id}")
        if response.status_code == 404:
            return False
        self._json(response)
        return True

    def answer(self, model_id: str, prompt: str, *, max_tokens: int = 1, timeout_s: float = _ANSWER_S) -> str:
        """The text that a placed model answers, greedily.

        Raises:
            ExoRefusedError: exo answered with an error, or not in time.
        """
        body = {
            "model": model_id,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        reply = self._json(self._send("POST", "/v1/chat/completions", json=body, timeout_s=timeout_s))
        message = reply["choices"][0]["message"]
        return str(message.get("reasoning_content") or "") + str(message.get("content") or "")

    def _send(
        self, method: str, path: str, *, json: object = None, params: Any = None, timeout_s: float = _TIMEOUT_S
    ) -> httpx.Response:
        try:
            return self._http.request(method, path, json=json, params=params, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise ExoUnreachableError(
                f"exo did not answer {method} {path} in time",
                expected=f"an answer within {timeout_s:g} s",
                where=self.url,
                fix="look at exo's window or log on that machine; restart exo if it hangs",
            ) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ExoUnreachableError(
                "no exo at the address",
                found=f"{type(error).__name__}: {error}",
                where=self.url,
                fix="start exo there, or give its address with --exo http://HOST:52415",
            ) from error

    def _json(self, response: httpx.Response) -> Any:
        request = f"{response.request.method} {response.request.url.path}"
        try:
            body = response.json()
        except ValueError as error:
            if not response.content:  # how exo ends an answer whose runner died
                raise ExoRefusedError(f"exo broke off its answer to {request}", where=self.url) from error
            raise self._not_exo() from error
        if response.status_code >= 400:
            raise ExoRefusedError(
                f"exo refused {request}", found=f"{response.status_code}: {_message(body)}", where=self.url
            )
        return body

    def _not_exo(self) -> ExoVersionError:
        found = "something that is not exo"
        try:
            if self._http.get("/healthcheck").status_code == 200:
                found = "exo 0.0.x"
            elif self._http.get("/health").status_code == 200:
                found = "a server of another kind (perhaps `exo-kimi serve`)"
        except httpx.TransportError:
            pass
        return ExoVersionError(
            "not an exo 1.x",
            expected="GET /state of exo v1.0.71 or later",
            found=found,
            where=self.url,
            fix="for exo 0.0.x: `exo-kimi exo-legacy --plan PLAN -- ARGS`, in place of `exo ARGS`"
            if "0.0" in found
            else "check the address and the port",
        )


def _message(body: object) -> str:
    """exo's message in an error body: OpenAI's shape, FastAPI's, or whatever it is."""
    if isinstance(body, dict):
        error = body.get("error")
        if isinstance(error, dict) and error.get("message"):
            return str(error["message"])
        detail = body.get("detail")
        if isinstance(detail, list):
            places = [f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg')}" for item in detail[:3]]
            return "; ".join(places) + (f" and {len(detail) - 3} more" if len(detail) > 3 else "")
        if detail:
            return str(detail)
    return str(body)[:300]
