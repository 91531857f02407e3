"""How much of OpenAI's and Anthropic's documented APIs servers honour, check by check.

    exo-kimi bench conformance http://127.0.0.1:52415 ...     any servers
    exo-kimi bench conformance --peer                         ours beside mlx_lm.server and exo, on one tiny checkpoint

Prints a table of all checks, one of their areas (Markdown), and then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx

from exo_kimi.bench.api import answers, messages, refusals, responses, streams, texts, tools
from exo_kimi.bench.api.caller import REQUEST_TIMEOUT_S, Broken, Caller, Check
from exo_kimi.bench.setups.exo_answering import MODEL, exo_server
from exo_kimi.bench.setups.exo_here import find_exo
from exo_kimi.bench.setups.peer import our_server, peer_server
from exo_kimi.checkpoint.tiny.make import make_tiny

# Kimi's turns, with tools, calls and results shown, and without reasoning. It names the call markers, by which the peer
# knows which parser of tool calls to use.
TEMPLATE = """
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
  {%- set head = {'user': '<|im_user|>', 'assistant': '<|im_assistant|>'}.get(message.role, '<|im_system|>') -%}
  {{- head + message.role + '<|im_middle|>' -}}
  {%- if message.role == 'tool' -%}{{- '## Return of ' + message.tool_call_id + '\\n' -}}{%- endif -%}
  {%- if message.content is string -%}{{- message.content -}}
  {%- else -%}{%- for part in message.content or [] -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
  {%- if message.tool_calls -%}
    {{- '<|tool_calls_section_begin|>' -}}
    {%- for call in message.tool_calls -%}
      {%- set arguments = call.function.arguments -%}
      {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' -}}
      {{- (arguments if arguments is string else arguments | tojson) + '<|tool_call_end|>' -}}
    {%- endfor -%}
    {{- '<|tool_calls_section_end|>' -}}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

CHECKS: tuple[Check, ...] = tuple(
    check for part in (answers, streams, tools, refusals, texts, responses, messages) for check in part.checks.items
)


EXO_TIMEOUT_S = 20.0  # of one answer: exo's own engine may hang when two requests decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one check found; `reason` is empty when the server does as documented."""

    check: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the server does as documented."""
        return not self.reason


def run_checks(url: str, api_key: str | None = None, checks: Sequence[Check] = CHECKS) -> list[Verdict]:
    """Every check against one server. An answer that a check cannot even read fails that check."""
    api = Caller(url, api_key=api_key)
    return [Verdict(check=check.name, reason=_reason(check, api)) for check in checks]


def run_with_restarts(
    server: Callable[[], AbstractContextManager[str]], *, model: str | None = None, timeout_s: float = REQUEST_TIMEOUT_S
) -> list[Verdict]:
    """Every check against a server of our own, started again whenever a check has killed it: it fails that check only.

    Args:
        server: starts it.
        model: to ask for; None takes the first that it lists.
        timeout_s: of one answer.
    """
    verdicts: list[Verdict] = []
    while len(verdicts) < len(CHECKS):
        with server() as url:
            api = Caller(url, model=model, timeout_s=timeout_s)
            for check in CHECKS[len(verdicts) :]:
                verdicts.append(Verdict(check=check.name, reason=_reason(check, api)))
                if not api.healthy():
                    break
    return verdicts


def table(checks: Sequence[Check], columns: dict[str, list[Verdict]]) -> str:
    """A Markdown table: a line for each check, a column for each server."""
    names = list(columns)
    lines = [f"| check | documented behaviour | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row, check in enumerate(checks):
        cells = ["yes" if columns[name][row].passed else f"no: {_cell(columns[name][row].reason)}" for name in names]
        lines.append(f"| {check.name} | {_cell(check.about, 160)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(checks: Sequence[Check], columns: dict[str, list[Verdict]]) -> str:
    """A Markdown table with a line for each area: how many of its checks each server passes."""
    lines = [f"| area | checks | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for area in dict.fromkeys(check.area for check in checks):
        rows = [row for row, check in enumerate(checks) if check.area == area]
        counts = [str(sum(verdicts[row].passed for row in rows)) for verdicts in columns.values()]
        lines.append(f"| {area} | {len(rows)} | {' | '.join(counts)} |")
    totals = [f"**{sum(verdict.passed for verdict in verdicts)}**" for verdicts in columns.values()]
    lines.append(f"| all | {len(checks)} | {' | '.join(totals)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 0 when the first server passes all of them."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench conformance", description="checks of OpenAI's documented API")
    parser.add_argument("urls", nargs="*", metavar="URL", help="base addresses of running servers")
    parser.add_argument("--peer", action="store_true", help="start ours and mlx_lm.server on a tiny checkpoint")
    parser.add_argument("--api-key", help="bearer token for the URLs")
    arguments = parser.parse_args(argv)
    if arguments.peer == bool(arguments.urls):
        parser.error("give URLs, or --peer")
    columns = compare() if arguments.peer else {url: run_checks(url, arguments.api_key) for url in arguments.urls}
    print(table(CHECKS, columns), summary(CHECKS, columns), sep="\n\n")
    print(json.dumps({"bench": "conformance", "servers": {name: _counts(found) for name, found in columns.items()}}))
    return 0 if all(verdict.passed for verdict in next(iter(columns.values()))) else 1


def compare() -> dict[str, list[Verdict]]:
    """Ours beside `mlx_lm.server`, and beside exo with its own engine where one can be started, one after the other.

    All on the same checkpoint, in fp32, which all run well on a CPU.
    """
    columns = {}
    with tempfile.TemporaryDirectory(prefix="conformance-") as temporary:
        checkpoint = make_tiny(Path(temporary) / "tiny", recipe="plain", dtype="F32", template=TEMPLATE)
        for name, server in (("exo-kimi", our_server), (f"mlx_lm.server {version('mlx-lm')}", peer_server)):
            print(f"{len(CHECKS)} checks against {name} ...", file=sys.stderr, flush=True)
            columns[name] = run_with_restarts(partial(server, checkpoint))
        if isinstance(exo := find_exo(), str):
            print(f"without exo: {exo}", file=sys.stderr)
        else:
            name = f"exo {exo.source.name}"
            print(f"{len(CHECKS)} checks against {name} ...", file=sys.stderr, flush=True)
            columns[name] = run_with_restarts(
                partial(exo_server, exo, checkpoint), model=MODEL, timeout_s=EXO_TIMEOUT_S
            )
    return columns


def _reason(check: Check, api: Caller) -> str:
    try:
        check.run(api)
    except Broken as broken:
        return str(broken)
    except httpx.HTTPError as error:
        return f"no answer: {type(error).__name__} {error}".strip()
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        return f"the answer cannot be read: {type(error).__name__}: {error}"
    return ""


def _cell(text: str, limit: int = 90) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _counts(verdicts: list[Verdict]) -> dict[str, object]:
    failed = [asdict(verdict) for verdict in verdicts if not verdict.passed]
    return {"passed": len(verdicts) - len(failed), "checks": len(verdicts), "failed": failed}


if __name__ == "__main__":
    sys.exit(main())
