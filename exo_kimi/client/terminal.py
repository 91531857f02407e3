"""A terminal chat against any server with OpenAI's chat API."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console

from exo_kimi.client.chat_client import ChatClient, Delta
from exo_kimi.errors import ExoKimiError

HELP = "/reset begins anew, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer"
_HIDDEN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    system: str | None = None,
    stdin: TextIO | None = None,
    console: Console | None = None,
) -> None:
    """Talks until /exit or the end of input. What comes through a pipe is one message, and the answer ends the program.

    Args:
        url: base address of the server, with or without `/v1`.
        api_key: sent as bearer token.
        model: None takes the server's first.
        system: system message.
        stdin: where the user writes; None is the program's own.
        console: where answers go; None is the program's own.

    Raises:
        UsageError: no server answers at the address.
        RequestError: (pipe) the server refused the request.
        RuntimeFault: (pipe) the server failed.
    """
    source = stdin or sys.stdin
    screen = console or Console()
    with ChatClient(url, api_key=api_key, model=model) as client:
        talk = Talk(client, screen, system)
        name = client.model()
        if source.isatty():
            screen.print(f"{name} at {client.url}", style="bold", markup=False, highlight=False)
            screen.print(HELP, style="dim", markup=False, highlight=False)
            talk.loop(lambda: screen.input("[bold]> [/bold]"))
        elif text := source.read().strip():
            talk.ask(text)


class Talk:
    """One conversation.

    Args:
        client: sends it.
        console: shows it.
        system: system message, or None.
    """

    def __init__(self, client: ChatClient, console: Console, system: str | None = None) -> None:
        self._client = client
        self._console = console
        self._system = system
        self._reasoning = False
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def loop(self, read: Callable[[], str]) -> None:
        """Read and answer until /exit or the end of input. An error is shown, and the conversation goes on."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D leaves")
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                try:
                    self.ask(line)
                except ExoKimiError as error:
                    self._console.print(str(error), style="red", markup=False, highlight=False)

    def ask(self, text: str) -> None:
        """Send a message and show the answer. Ctrl-C stops the answer; what came so far stays in the conversation.

        Raises:
            ExoKimiError: the request failed; the message is taken back, so that it can be sent again.
        """
        asked = {"role": "user", "content": text}
        parts: list[Delta] = []
        self._reasoning = False
        try:
            for delta in self._client.stream([*self.messages, asked]):
                parts.append(delta)
                self._show(delta)
        except KeyboardInterrupt:
            self._note(" [stopped]")
        finally:
            self._console.out("")
        self.messages += [asked, {"role": "assistant", "content": "".join(part.content for part in parts)}]

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/system":
            self._system = rest.strip() or None
        if name in ("/reset", "/system"):
            self.reset()
            self._note("a new conversation" + (f", system: {self._system}" if self._system else ""))
        else:
            self._note(HELP)

    def _show(self, delta: Delta) -> None:
        self._write(delta.reasoning, style="dim")
        if self._reasoning and delta.content:
            self._write("\n\n")
        self._reasoning = bool(delta.reasoning) or (self._reasoning and not delta.content)
        self._write(delta.content)
        for call in delta.tool_calls:
            self._write(f"[{call}]", style="cyan")
        if delta.finish_reason == "length":
            self._note(" [cut: the token limit was reached]")

    def _write(self, text: str, style: str | None = None) -> None:
        if text:
            # A model's text must not steer the terminal: control characters are dropped.
            self._console.out(text.translate(_HIDDEN), style=style, highlight=False, end="")
            self._console.file.flush()

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)
