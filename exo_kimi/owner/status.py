"""`exo-kimi status`: what runs on this machine and how it fares, from its services, their logs, and a server's own words."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from exo_kimi.errors import ExoKimiError, UsageError
from exo_kimi.owner.asking import DEFAULT_URL, NoAnswer, ServerAnswer, ServerToAsk, StageWords, ask_server
from exo_kimi.owner.service.install import Services
from exo_kimi.owner.service.spec import ServiceSpec, installed, read_spec
from exo_kimi.owner.service_logs import LogQuery, read_log
from exo_kimi.planner.plan import read_plan
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.transport.api_key import find_api_key
from exo_kimi.units import format_bytes

LOOK_S = 1.0
FAULTS_SHOWN = 5
NO_SERVER = "no exo-kimi server answers"


def status_of(services: Services, server: ServerToAsk | None) -> tuple[list[str], bool]:
    """The whole status with the last faults, and whether the server answered; arguments as of `status_lines`."""
    lines = status_lines(services, server)
    return lines, not lines[-1].startswith(NO_SERVER)


def status_lines(services: Services, server: ServerToAsk | None, *, faults: bool = True) -> list[str]:
    """The whole status.

    Args:
        services: of this user.
        server: to ask; None takes the one that a service says, or this machine's default.
        faults: with the last warnings of the services' logs.
    """
    versions = Versions.installed()
    lines = [
        f"exo-kimi {versions.exo_kimi}, mlx {versions.mlx}, mlx-lm {versions.mlx_lm}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    ]
    names = installed(services.directories.services)
    lines += ["", "services", *(f"  {line}" for line in services.status())] if names else []
    for name in names:
        spec = read_spec(services.directories.services, name)
        lines += _planned(spec)
        lines += _faults(spec, services.directories.logs) if faults else []
    return [*lines, "", *server_lines(server or server_of(services) or ServerToAsk(url=DEFAULT_URL))]


def server_of(services: Services) -> ServerToAsk | None:
    """The server among the services, with its key where that is in a file."""
    for name in installed(services.directories.services):
        spec = read_spec(services.directories.services, name)
        if spec.words[0] == "serve":
            host = option_of(spec.words, "--host") or "127.0.0.1"
            host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # compared, not bound
            key_file = option_of(spec.words, "--api-key-file")
            path = None if key_file is None else Path(spec.directory) / Path(key_file).expanduser()
            key = find_api_key(key_file=path, option=None, environment_text=None)
            host = f"[{host}]" if ":" in host else host
            return ServerToAsk(url=f"http://{host}:{option_of(spec.words, '--port') or 52415}", key=key)
    return None


def option_of(words: Sequence[str], name: str) -> str | None:
    """The value of an option among words."""
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def server_lines(server: ServerToAsk) -> list[str]:
    """What a server says of itself; one line where none answers."""
    first, began_s = ask_server(server), time.monotonic()
    time.sleep(0.0 if isinstance(first, NoAnswer) else LOOK_S)
    second, passed_s = first if isinstance(first, NoAnswer) else ask_server(server), time.monotonic() - began_s
    if isinstance(first, NoAnswer) or isinstance(second, NoAnswer):
        reason = first.reason if isinstance(first, NoAnswer) else second.reason if isinstance(second, NoAnswer) else ""
        return [f"{NO_SERVER} at {server.url}: {reason}"]
    health = second.health
    lines = [f"server at {server.url}: {health.status}"]
    if health.reason:
        lines.append(f"  because  {health.reason}")
    if health.stages is None:
        what = "it does not take this key" if server.key else "it tells the rest with its key only"
        return [*lines, f"  {what}: --api-key-file FILE"]
    lines.append(f"  model    {health.model}, exo-kimi {health.version}, context {health.context}")
    lines += [f"  stage {_stage_line(stage)}" for stage in health.stages]
    requests = ", ".join(f"{count} {state}" for state, count in health.requests.items())
    lines.append(f"  requests {requests}")
    lines.append(f"  KV       {health.kv_reserved_tokens} of {health.kv_capacity_tokens} tokens held")
    before, now = _samples(first), _samples(second)

    def rate(name: str) -> float:
        return (now.get(name, 0.0) - before.get(name, 0.0)) / passed_s

    lines.append(
        f"  speed    {rate('exo_kimi_generated_tokens_total'):.1f} tokens/s generated, "
        f"{rate('exo_kimi_prompt_tokens_total'):.1f} tokens/s of prompts, now"
    )
    totals = {name: int(now.get(f"exo_kimi_requests{name}_total", 0)) for name in ("", "_failed", "_interrupted")}
    lines.append(
        f"  so far   {totals['']} requests, {totals['_failed']} failed, {totals['_interrupted']} times one waited for "
        f"stages, {int(now.get('exo_kimi_generated_tokens_total', 0))} tokens"
    )
    lines += [f"  event    {event}" for event in health.events[-FAULTS_SHOWN:]]
    return lines


def _stage_line(stage: StageWords) -> str:
    fault = f", last error: {stage.last_error.splitlines()[0]}" if stage.last_error else ""
    loading = "" if stage.state != "loading" else f" {100 * stage.loading_progress:.0f} %"
    return (
        f"{stage.stage}  {stage.state}{loading}, layers {stage.start_layer}:{stage.end_layer}, "
        f"{format_bytes(stage.weights_bytes)} weights, {format_bytes(stage.kv_bytes)} caches, "
        f"heard {stage.silent_s:.1f} s ago, {stage.restarts} restarts{fault}"
    )


def _samples(answer: ServerAnswer) -> dict[str, float]:
    """Metrics without labels; none of what is no text of metrics."""
    try:
        families = list(text_string_to_metric_families(answer.metrics))
    except ValueError:
        return {}
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def _planned(spec: ServiceSpec) -> list[str]:
    """The plan of a service, in a line."""
    if (name := option_of(spec.words, "--plan")) is None:
        return []
    try:
        plan = read_plan(Path(spec.directory) / name)
    except ExoKimiError as error:
        return [f"  plan of {spec.name}: {error.what}"]
    stages = ", ".join(f"{each.machine} {each.start_layer}:{each.end_layer}" for each in plan.stages)
    return [f"  plan of {spec.name}: {stages}, context {plan.workload.context}"]


def _faults(spec: ServiceSpec, logs: Path) -> list[str]:
    try:
        faults = read_log(spec.name, logs, LogQuery(lines=FAULTS_SHOWN, level="WARNING"))
    except UsageError:
        return []
    return [f"  {spec.name} said: {fault}" for fault in faults]
