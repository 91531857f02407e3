"""Commands of the owner's day: services, status, logs, a report and the verification of a Mac."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from exo_kimi.cli.output import write_text
from exo_kimi.cli.values import argument, flag, option, positive, whole

KeyFile = Annotated[
    Path | None,
    option("--api-key-file", metavar="FILE", help="file, mode 600, with the server's key (or EXO_KIMI_API_KEY)"),
]
Service = Annotated[str | None, argument("[NAME]", "of a service (default: the only one)")]


def service_install(
    words: Annotated[list[str], argument("COMMAND ...", "serve DIR ..., stage --listen ADDR ..., or exo run -- ARGS")],
    name: Annotated[
        str | None, option("--name", metavar="NAME", help="of the service (default: the command's)")
    ] = None,
    variables: Annotated[
        list[str], option("--env", metavar="NAME=VALUE", help="a variable for it, not for secrets; repeat for more")
    ] = [],  # noqa: B006
    no_start: Annotated[bool, flag("--no-start", help="write its files only")] = False,
) -> None:
    """Have a command start at every login, and again whenever it ends."""
    from exo_kimi.cli.app import check_words
    from exo_kimi.owner.service.install import Installation
    from exo_kimi.owner.service.spec import kind_of

    kind_of(words)
    check_words(words)
    asked = Installation(words=tuple(words), name=name, variables=tuple(variables), directory=Path.cwd())
    _say(_services().install(asked, os.environ, start=not no_start))


def service_status() -> None:
    """Every service, and whether it runs."""
    _say(_services().status() or ["no service is installed: exo-kimi service install serve DIR ..."])


def service_logs(
    name: Service = None,
    lines: Annotated[int, option("-n", "--lines", parser=positive, metavar="N", help="the last N (default 50)")] = 50,
    follow: Annotated[bool, flag("-f", "--follow", help="and those to come, until Ctrl-C")] = False,
    request: Annotated[
        str | None, option("--request", metavar="ID", help="of one request, by the `x-request-id` of its answer")
    ] = None,
    level: Annotated[str | None, option("--level", metavar="LEVEL", help="WARNING: warnings and errors")] = None,
) -> None:
    """What a service wrote."""
    from exo_kimi.owner.service_logs import LogQuery, follow_log, read_log

    services, query = _services(), LogQuery(lines=lines, request=request, level=level and level.upper())
    chosen, folder = services.only(name), services.directories.logs
    _say(read_log(chosen, folder, query))
    if follow:
        for line in follow_log(chosen, folder, query):
            print(line, flush=True)


def service_uninstall(name: Service = None) -> None:
    """Stop a service and remove its files; its logs stay."""
    services = _services()
    _say(services.uninstall(services.only(name)))


def service_run(name: Annotated[str, argument("NAME")]) -> None:
    """The body of a service: what launchd and systemd start."""
    from exo_kimi.owner.directories import OwnerDirectories
    from exo_kimi.owner.service.running import run_service
    from exo_kimi.owner.service.spec import read_spec

    directories = OwnerDirectories.here()
    raise SystemExit(run_service(read_spec(directories.services, name), directories.logs))


def status(
    url: Annotated[str | None, option("--url", metavar="URL", help="a server (default: this machine's)")] = None,
    api_key_file: KeyFile = None,
) -> int:
    """Services, stages, speed, memory, requests and the last faults; 1 where no server answers."""
    from exo_kimi.owner.status import status_of

    lines, answered = status_of(_services(), _server(url, api_key_file))
    _say(lines)
    return 0 if answered else 1


def report(
    output: Annotated[
        Path, option("-o", "--output", metavar="FILE.zip", help="what is written (default exo-kimi-report.zip)")
    ] = Path("exo-kimi-report.zip"),
    lines: Annotated[
        int, option("-n", "--lines", parser=positive, metavar="N", help="of each log, the last N (default 5000)")
    ] = 5000,
    enclosed: Annotated[
        list[Path], option("--with", metavar="FILE", help="results of `verify` or `bench`; repeat for more")
    ] = [],  # noqa: B006
    logs: Annotated[
        list[Path], option("--log", metavar="FILE", help="a log of a server that is no service; repeat for more")
    ] = [],  # noqa: B006
    url: Annotated[str | None, option("--url", metavar="URL", help="a server (default: this machine's)")] = None,
    api_key_file: KeyFile = None,
) -> None:
    """Logs, plan, status, versions and results in one file to send: no texts, no keys, no home paths."""
    from exo_kimi.owner.report import ReportOptions, write_report

    asked = _server(url, api_key_file)
    options = ReportOptions(output=output, lines=lines, enclosed=tuple(enclosed), logs=tuple(logs), server=asked)
    names = write_report(options, _services(), os.environ)
    _say([*(f"  {name}" for name in names), f"wrote {output}: look into it before you send it"])


def verify(
    output: Annotated[
        Path, option("-o", "--output", metavar="FILE", help="what is written (default verify.json)")
    ] = Path("verify.json"),
    checkpoint: Annotated[
        Path | None, option("--checkpoint", metavar="DIR", help="for a real layer's time (default: none is run)")
    ] = None,
    layer: Annotated[int | None, option("--layer", parser=whole, metavar="N", help="of it (default: the last)")] = None,
    plan: Annotated[
        Path | None, option("--plan", metavar="PLAN.json", help="for the wired limit that it needs")
    ] = None,
    link: Annotated[
        str | None,
        option("--link", metavar="HOST:PORT", help="of `exo-kimi bench link-speed --listen` on the other Mac"),
    ] = None,
    only: Annotated[list[str], option("--only", metavar="NAME", help="this check; repeat for more")] = [],  # noqa: B006
) -> int:
    """What only this machine can show, in minutes: operations, answers, reads, early pieces, speed; one file to send."""
    from exo_kimi.bench.claims.link_speed import measure_link
    from exo_kimi.bench.claims.machine import measure
    from exo_kimi.owner.verify.run import Measures, VerifyOptions, to_json, verify

    options = VerifyOptions(checkpoint=checkpoint, layer=layer, plan=plan, link=link, only=tuple(only))
    table, good = verify(
        options, Measures(machine=measure, link=measure_link), say=lambda line: print(line, flush=True)
    )
    write_text(output, to_json(table), option="-o")
    return 0 if good else 1


def _server(url: str | None, api_key_file: Path | None) -> Any:
    """The server that was named, by its address or its key."""
    from exo_kimi.owner.asking import server_at
    from exo_kimi.runtime.transport.api_key import ENVIRONMENT_NAME, find_api_key

    text = os.environ.get(ENVIRONMENT_NAME)
    key = find_api_key(key_file=api_key_file, option=None, environment_text=text)
    return server_at(url, key) if url or key else None


def _services() -> Any:
    from exo_kimi.owner.directories import OwnerDirectories
    from exo_kimi.owner.service.install import Services
    from exo_kimi.owner.service.manager import manager_here

    directories = OwnerDirectories.here()
    return Services(directories, manager_here(directories))


def _say(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)
