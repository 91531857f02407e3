"""A running server as one side of a comparison: its replies, and its log-probabilities of the tokens that it chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from exo_kimi.chat.events import ToolCallEvent
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.compress.compare.replies import Reply, ends_in_loop
from exo_kimi.compress.compare.tokens import SavedTokens
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.prompts import DomainPrompt
from exo_kimi.errors import RuntimeFault, UsageError

TIMEOUT_S = 600.0
TOP = 20
"""Most alternatives of a token that OpenAI's API gives."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServer:
    """A server with OpenAI's API, and the model that it names first.

    Args:
        url: with or without `/v1`.
        client: open, with the key.
        model: its name.
        max_tokens: of a reply.
    """

    url: str
    client: httpx.Client
    model: str
    max_tokens: int

    @classmethod
    def open(
        cls, url: str, *, api_key: str | None, max_tokens: int, transport: httpx.BaseTransport | None = None
    ) -> ModelServer:
        """Connect.

        Args:
            url: of the server.
            api_key: sent with each request.
            max_tokens: of a reply.
            transport: another way to reach the server (tests).

        Raises:
            UsageError: the address cannot be read, or no chat server answers there.
        """
        client = open_client(url, api_key, transport)
        return cls(url=url, client=client, model=served_model(client), max_tokens=max_tokens)

    def answer(self, conversations: Sequence[tuple[list[Any], list[Any] | None]]) -> list[Reply]:
        """Replies at temperature 0, one after the other.

        Raises:
            RuntimeFault: the server went away, or its answer cannot be read.
        """
        return [self._reply(messages, tools) for messages, tools in conversations]

    def _reply(self, messages: list[Any], tools: list[Any] | None) -> Reply:
        body: dict[str, Any] = {"messages": messages, **({"tools": tools} if tools else {})}
        choice = self._post("/v1/chat/completions", body)
        message = choice["message"]
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        calls = [
            ToolCallEvent(index, str(call["id"]), str(call["function"]["name"]), str(call["function"]["arguments"]))
            for index, call in enumerate(message.get("tool_calls") or ())
        ]
        return Reply(
            content=content.strip(),
            reasoning=reasoning.strip(),
            calls=calls,
            closed=choice.get("finish_reason") != "length",
            looped=ends_in_loop(f"{reasoning} {content}".split()),
        )

    def choose(self, ids: Sequence[int]) -> Mapping[str, Any]:
        """`logprobs` of a greedy continuation of token ids."""
        found: Any = self._post("/v1/completions", {"prompt": list(ids), "logprobs": TOP})["logprobs"]
        if not found or not found.get("top_logprobs"):
            raise UsageError("the server gives no log-probabilities", where=f"{self.url}/v1/completions")
        result: Mapping[str, Any] = found
        return result

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        whole = {**body, "model": self.model, "temperature": 0, "max_tokens": self.max_tokens, "stream": False}
        try:
            response = self.client.post(path, json=whole)
            if response.status_code != 200:
                raise RuntimeFault(
                    f"the server answered HTTP {response.status_code}", found=response.text[:300], where=self.url + path
                )
            return response.json()["choices"][0]
        except httpx.TransportError as error:
            raise RuntimeFault("the server went away", where=self.url, found=error) from None
        except (ValueError, LookupError, TypeError) as error:
            raise RuntimeFault("the server's answer cannot be read", where=self.url + path, found=error) from None


def server_tokens(server: ModelServer, prompts: Sequence[DomainPrompt], encoder: Encoder, *, say: Say) -> SavedTokens:
    """The server's greedy continuations of prompts as texts, and what it said of each token.

    Args:
        server: whose model has the encoder's vocabulary.
        prompts: with their replies, which are not used.
        encoder: of a directory with the same vocabulary; it renders the prompts, so that both sides continue the same ids.
        say: called with a line of progress.

    Raises:
        UsageError: the server gives no log-probabilities, or none of its tokens has an id here.
        RuntimeFault: the server went away.
    """
    by_text = _ids_by_text(encoder.tokenizer)
    texts: list[Encoded] = []
    rows: list[tuple[float, list[int], list[float]]] = []
    for number, prompt in enumerate(prompts, start=1):
        ids = encoder.template.render(prompt.messages[:-1], prompt.tools).ids
        said = server.choose(ids)
        made, lines = _readable(said, by_text)
        if made:
            counted = np.arange(len(ids) + len(made)) >= len(ids)
            texts.append(Encoded(ids=np.array([*ids, *made], np.int32), counted=counted, domain=prompt.domain))
            rows += lines
        say(f"{server.url}: {number} of {len(prompts)}")
    if not rows:
        raise UsageError("no token of the server's replies is one of this vocabulary", where=server.url)
    width = max(len(ids) for _, ids, _ in rows)
    return SavedTokens(
        name=server.url,
        texts=tuple(texts),
        target=np.array([target for target, _, _ in rows]),
        ids=np.array([ids + [-1] * (width - len(ids)) for _, ids, _ in rows], np.int64),
        logs=np.array([logs + [np.nan] * (width - len(logs)) for _, _, logs in rows]),
    )


def _readable(
    said: Mapping[str, Any], by_text: Mapping[str, int]
) -> tuple[list[int], list[tuple[float, list[int], list[float]]]]:
    """Ids of a reply up to the first token that its text does not tell, and for each its log p and the alternatives known."""
    made, rows = list[int](), list[tuple[float, list[int], list[float]]]()
    for text, target, tops in zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True):
        if text not in by_text:
            break
        known = sorted(((log, by_text[each]) for each, log in tops.items() if each in by_text), reverse=True)
        if not known:
            break
        made.append(by_text[text])
        rows.append((float(target), [token for _, token in known], [float(log) for log, _ in known]))
    return made, rows


def _ids_by_text(tokenizer: KimiTokenizer) -> dict[str, int]:
    """Ids by their text, where one has it alone: pieces of characters all show as the same replacement."""
    found: dict[str, int] = {}
    twice: set[str] = set()
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        if text in found or "\N{REPLACEMENT CHARACTER}" in text:
            twice.add(text)
        found[text] = token
    return {text: token for text, token in found.items() if text not in twice}


def open_client(url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """A client for a server with OpenAI's API.

    Raises:
        UsageError: the address cannot be read.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT_S, transport=transport, trust_env=False)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UsageError("cannot read the server's address", found=f"{url} ({error})") from None


def served_model(client: httpx.Client) -> str:
    """The first model that a server names.

    Raises:
        UsageError: nothing answers, or not as a chat server.
    """
    try:
        return str(client.get("/v1/models").json()["data"][0]["id"])
    except httpx.TransportError as error:
        raise UsageError("no server answers", where=client.base_url, found=error) from None
    except (ValueError, LookupError, TypeError):
        raise UsageError("this is not a chat server", where=f"{client.base_url}/v1/models") from None
