"""`exo-kimi report`: what happened here in one file to send, without texts, keys or home paths (see `cleaning`)."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.errors import ExoKimiError, UsageError
from exo_kimi.owner.asking import DEFAULT_URL, NoAnswer, ServerToAsk, ask_server
from exo_kimi.owner.cleaning import Cleaner
from exo_kimi.owner.service.install import Services
from exo_kimi.owner.service.spec import SECRETS, ServiceSpec, installed, read_spec
from exo_kimi.owner.service_logs import LogQuery, log_files, read_log
from exo_kimi.owner.status import option_of, server_of, status_lines
from exo_kimi.runtime.transport.keys import default_key_file

ENCLOSED_BYTES = 4 << 20
GZIP = b"\x1f\x8b"
_SECRET_VARIABLES = (*SECRETS, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What `exo-kimi report` was told.

    Args:
        output: the zip file.
        lines: of each log, the last.
        enclosed: files of measurements to take along, as JSON or text: of `verify` and `bench`.
        logs: further log files, of servers that are no services.
        server: to ask; None: as `status`.
    """

    output: Path
    lines: int = 5000
    enclosed: tuple[Path, ...] = ()
    logs: tuple[Path, ...] = ()
    server: ServerToAsk | None = None


def write_report(options: ReportOptions, services: Services, environment: Mapping[str, str]) -> list[str]:
    """Write the file; the names of what is in it.

    Raises:
        UsageError: a file cannot be read, or the report not written.
    """
    specs = [read_spec(services.directories.services, name) for name in installed(services.directories.services)]
    cleaner = Cleaner(known_secrets(specs, options.server, environment), Path.home())
    server = options.server or server_of(services)
    parts = {"status.txt": "\n".join(cleaner.message(line) for line in status_lines(services, server, faults=False))}
    parts |= _server_parts(server or ServerToAsk(url=DEFAULT_URL), cleaner)
    for spec in specs:
        if log_files(spec.name, services.directories.logs):
            lines = read_log(spec.name, services.directories.logs, LogQuery(lines=options.lines))
            parts[f"logs/{spec.name}.log"] = "\n".join(cleaner.log(lines))
        parts |= _spec_parts(spec, cleaner)
    # Names of files are their owner's words: what is in a report has a number.
    for number, path in enumerate(options.logs, start=1):
        lines = _read(path, "--log", last_lines=options.lines).splitlines()
        parts[f"logs/given-{number}.log"] = "\n".join(cleaner.log(lines))
    for number, path in enumerate(options.enclosed, start=1):
        parts[f"enclosed/{number}.txt"] = cleaner.text(_read(path, "--with"))
    try:
        descriptor = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in sorted(parts.items()):
                archive.writestr(name, text + "\n")
    except OSError as error:
        raise UsageError("the report cannot be written", found=error.strerror, where=f"-o {options.output}") from None
    return sorted(parts)


def known_secrets(
    specs: Sequence[ServiceSpec], server: ServerToAsk | None, environment: Mapping[str, str]
) -> list[str]:
    """Every key of which this machine knows: of services, of the cluster, of variables."""
    found = [environment[name] for name in _SECRET_VARIABLES if environment.get(name)]
    if server is not None and server.key:
        found.append(server.key)
    files = [default_key_file()]
    for spec in specs:
        found += [value for name, value in spec.environment.items() if name.endswith(("KEY", "TOKEN", "SECRET"))]
        options = [option_of(spec.words, name) for name in ("--api-key-file", "--key-file")]
        files += [Path(spec.directory) / Path(name).expanduser() for name in options if name is not None]
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it is not there, so nothing here knows it
        found += [text, *text.split()]
    return found


def _server_parts(server: ServerToAsk, cleaner: Cleaner) -> dict[str, str]:
    answer = ask_server(server)
    if isinstance(answer, NoAnswer):
        return {"server.txt": cleaner.text(f"no exo-kimi server answers at {server.url}: {answer.reason}")}
    health = json.dumps(cleaner.values(json.loads(answer.health_json)), indent=1)
    return {"health.json": health, "metrics.txt": cleaner.text(answer.metrics)}


def _spec_parts(spec: ServiceSpec, cleaner: Cleaner) -> dict[str, str]:
    """Its words, its plan, and what the doctor says of its checkpoint."""
    parts = {f"services/{spec.name}.txt": cleaner.text(f"exo-kimi {' '.join(spec.words)}")}
    if (plan := option_of(spec.words, "--plan")) is not None:
        try:
            parts[f"plans/{spec.name}.json"] = cleaner.text(_read(Path(spec.directory) / plan, "--plan"))
        except UsageError as error:
            parts[f"plans/{spec.name}.txt"] = cleaner.text(str(error))
    if spec.words[0] == "serve" and len(spec.words) > 1:
        try:
            parts[f"doctor/{spec.name}.txt"] = cleaner.text(inspect(Path(spec.directory) / spec.words[1]).to_text())
        except ExoKimiError as error:
            parts[f"doctor/{spec.name}.txt"] = cleaner.text(str(error))
    return parts


def _read(path: Path, option: str, *, last_lines: int | None = None) -> str:
    """A text, packed by gzip or not: its beginning, or its last lines.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    where = f"{option} {path}"
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            data = stream.read(ENCLOSED_BYTES) if last_lines is None else b"".join(deque(stream, maxlen=last_lines))
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or error
        raise UsageError("cannot read the file", found=found, where=where) from None
    if b"\0" in data:
        raise UsageError("not a text, and what is in it cannot be looked through", where=where)
    return data.decode(errors="replace")
