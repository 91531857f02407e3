"""A long life: `exo-kimi serve` under traffic and troubles for as many minutes as one likes, and one table of verdicts.

    exo-kimi bench soak --minutes 60 [--checkpoint DIR]

Clients ask questions whose right answers are known, read them, leave in the middle or never read. Meanwhile stages are killed and
frozen, the server is frozen, descriptors run out, the disk is full, connections stay half open. Every answer is judged, and
what the server holds of memory and descriptors, how long it takes to serve again, its log, and its end.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.bench.soak.clients import ANSWER_S, Clients, Seen, SoakPrompt, Wrong, ask, questions
from exo_kimi.bench.soak.server import END_S, Held, SoakServer, held_by, soak_server
from exo_kimi.bench.soak.ties import TieJudge
from exo_kimi.bench.soak.troubles import SMALL_DISK_BYTES, Trouble, Troubles, small_disk
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.units import parse_seconds

STALL_S = 4.0
QUESTIONS = 40
PAUSE_S = (4.0, 12.0)  # between troubles
QUIET_S = 15.0  # after the first fifth and at the end: what is held then is compared
RECOVERY_S = 30.0  # after a trouble, until an answer is right again
GROWTH_BYTES = 8 << 20  # of the server, from the first fifth to the end
GROWTH_DESCRIPTORS = 8
LOG_BYTES = 800  # of the log for each request, and
TROUBLE_LOG_BYTES = 16 << 10  # for each trouble
_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "n_routed_experts": 8,
}


@dataclass(slots=True)
class Course:
    """What happened while the server lived.

    Args:
        troubles: how often each was done.
        recoveries_s: after each, how long until an answer was right again, and its name.
        stuck: troubles after which none was.
        early, late: what the server held, at rest, at the end, and after a fifth of the time and a trouble of each kind (at the
            latest after half of it).
        most_rss_bytes: of the server at any time.
        requests_between: that were answered between early and late.
    """

    troubles: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[tuple[float, str]] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    early: Held | None = None
    late: Held | None = None
    most_rss_bytes: int = 0
    requests_between: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status: 1 when any verdict is bad."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="what is served (default: a tiny one)")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of questions and troubles")
    parser.add_argument("--survive", default="0s", metavar="TIME", help="of the server (default 0s: faults are errors)")
    parser.add_argument("--only", default="", metavar="TEXT", help="troubles whose name has this regular expression")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="of the longest answers (default 48)")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.clients < 1:
        raise UsageError(
            "a soak needs time and clients", found=f"--minutes {options.minutes} --clients {options.clients}"
        )
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="exo-kimi-soak-")))
        checkpoint = options.checkpoint or make_tiny(folder / "tiny", config=_SMALL)
        disk = held.enter_context(small_disk(folder))
        words = ["--stages", str(options.stages), "--dtype", "float32", "--stall-deadline", f"{STALL_S:g}s"]
        words += ["--survive", options.survive]
        words += ["--prefix-disk-bytes", str(SMALL_DISK_BYTES // options.stages // 2)]
        words += ["--prefix-dir", str(disk or folder / "prefixes")]
        server = held.enter_context(soak_server(checkpoint, folder, words))
        answers = _right_answers(server, options)
        generator = random.Random(options.seed)
        troubles = held.enter_context(closing(Troubles(server, generator, disk=disk, stall_s=STALL_S)))
        chosen = [trouble for trouble in troubles.all() if re.search(options.only, trouble.name)]
        if not chosen:
            raise UsageError("no trouble is called so", found=options.only, where="--only")
        with Clients(server.url, options.clients, answers, options.seed) as clients:
            course = _run(server, clients, chosen, generator, minutes=options.minutes)
        alive = server.alive
        last_words = server.log_lines()
        ended_s, left = server.end() if alive else (0.0, [])
        ties = _ties(checkpoint, clients.seen.wrong)
        rows = [
            *_answer_rows(clients.seen, ties=ties, survive=parse_seconds(options.survive) > 0),
            *_life_rows(course, alive=alive, ended_s=ended_s, left=len(left)),
            _log_row(server, clients.seen, course),
        ]
    notes = [*_notes(course, clients.seen, troubles), *([] if alive else [f"its last words: {last_words}"])]
    return finish(Result(bench="soak", rows=rows, notes=notes), options)


def _right_answers(server: SoakServer, options: argparse.Namespace) -> dict[SoakPrompt, str]:
    """Every question asked alone, before anything goes wrong."""
    answers = {}
    with httpx.Client(base_url=server.url, timeout=ANSWER_S, trust_env=False) as client:
        for question in questions(QUESTIONS, random.Random(options.seed), longest_tokens=options.tokens):
            verdict = ask(client, question, None, kind="whole")
            if verdict.kind != "right":
                raise UsageError("the server does not answer at all", found=f"{verdict.kind} {verdict.detail}")
            answers[question] = verdict.detail
    return answers


def _run(
    server: SoakServer, clients: Clients, chosen: Sequence[Trouble], generator: random.Random, *, minutes: float
) -> Course:
    course = Course()
    began_s = time.monotonic()
    until_s, early_s, half_s = (began_s + share * minutes for share in (60, 12, 30))
    stopped = threading.Event()
    sampling = threading.Thread(target=_sample, args=(server, course, stopped), daemon=True)
    sampling.start()
    bag: list[str] = []
    acts = {trouble.name: trouble.act for trouble in chosen}
    answered_early = 0
    while time.monotonic() < until_s - QUIET_S and server.alive:
        every_kind = course.troubles.keys() >= acts.keys()  # what is needed once for each kind is no growth
        if course.early is None and time.monotonic() > (early_s if every_kind else half_s):
            course.early, answered_early = _at_rest(server), clients.seen.answered
        if not bag:  # each comes as often as every other
            bag = generator.sample(sorted(acts), len(acts))
        name = bag.pop()
        minutes_in, rss_bytes = (time.monotonic() - began_s) / 60, held_by(server.process.pid).rss_bytes or 0
        print(
            f"{minutes_in:.1f} min, {clients.seen.answered} answers, {rss_bytes / 1e6:.1f} MB: {name}", file=sys.stderr
        )
        acts[name]()
        course.troubles[name] += 1
        _wait_recovered(server, clients.seen, course, name)
        time.sleep(generator.uniform(*PAUSE_S))
    course.late = _at_rest(server)
    course.requests_between = clients.seen.answered - answered_early
    stopped.set()
    sampling.join()
    return course


def _wait_recovered(server: SoakServer, seen: Seen, course: Course, name: str) -> None:
    """Until an answer that was finished after the trouble is right, or it takes too long."""
    began_s = time.monotonic()
    while server.alive and time.monotonic() - began_s < 4 * RECOVERY_S:
        if seen.last_right_s > began_s and server.is_ready():
            course.recoveries_s.append((time.monotonic() - began_s, name))
            print(f"right again after {course.recoveries_s[-1][0]:.1f} s", file=sys.stderr)
            return
        time.sleep(0.1)
    course.stuck.append(name)


def _at_rest(server: SoakServer) -> Held:
    """What the server holds: the median of some seconds without trouble, under the clients' traffic."""
    looks = []
    until_s = time.monotonic() + QUIET_S
    while time.monotonic() < until_s:
        looks.append(held_by(server.process.pid))
        time.sleep(0.5)
    rss = [look.rss_bytes for look in looks if look.rss_bytes is not None]
    descriptors = [look.descriptors for look in looks if look.descriptors is not None]
    return Held(
        rss_bytes=int(statistics.median(rss)) if rss else None,
        descriptors=int(statistics.median(descriptors)) if descriptors else None,
    )


def _sample(server: SoakServer, course: Course, stopped: threading.Event) -> None:
    while not stopped.wait(1.0):
        course.most_rss_bytes = max(course.most_rss_bytes, held_by(server.process.pid).rss_bytes or 0)


def _ties(checkpoint: Path, wrong: Sequence[Wrong]) -> int:
    """How many of these answers differ by a tie of floating-point numbers alone."""
    if not wrong:
        return 0
    judge = TieJudge(checkpoint)
    return sum(judge.is_tie(each.question, each.expected, each.found) for each in wrong)


def _answer_rows(seen: Seen, *, ties: int, survive: bool) -> list[Row]:
    counts = Counter(seen.counts)
    counts["wrong"] -= ties
    told = "told what happened"
    return [
        Row(name="right answers", ours=counts["right"], unit="requests", ratio=counts["right"], bar=1),
        _at_most(told, counts["told"], "requests", 0)
        if survive
        else Row(name=told, ours=counts["told"], unit="requests", ratio=counts["told"]),
        Row(name="left by their clients", ours=counts["left"], unit="requests", ratio=counts["left"]),
        _at_most(
            "ties", ties, "requests", max(1, counts["right"] // 100), note="proven: a draw on the border of two tokens"
        ),
        *(_at_most(f"{kind} answers", counts[kind], "requests", 0) for kind in ("wrong", "hung", "unclear")),
    ]


def _life_rows(course: Course, *, alive: bool, ended_s: float, left: int) -> list[Row]:
    longest_s, after = max(course.recoveries_s, default=(0.0, ""))
    rows = [
        _at_most("troubles that it never got over", len(course.stuck), "troubles", 0),
        _at_most("the server ended by itself", 0 if alive else 1, "times", 0),
        _at_most("longest until right again", longest_s, "s", RECOVERY_S, note=f"after: {after}" if after else ""),
    ]
    early, late = course.early, course.late
    if early is not None and late is not None:
        if early.rss_bytes is not None and late.rss_bytes is not None:
            note = (
                f"{early.rss_bytes / 1e6:.1f} to {late.rss_bytes / 1e6:.1f} MB over {course.requests_between} requests"
            )
            grown = late.rss_bytes - early.rss_bytes
            rows.append(_at_most("growth of the server", grown, "bytes", GROWTH_BYTES, note=note))
        if early.descriptors is not None and late.descriptors is not None:
            note = f"{early.descriptors} to {late.descriptors}"
            grown = late.descriptors - early.descriptors
            rows.append(_at_most("descriptors more", grown, "", GROWTH_DESCRIPTORS, note=note))
    return [
        *rows,
        _at_most("Ctrl-C to the end", ended_s, "s", END_S),
        _at_most("stages that outlived it", left, "processes", 0),
    ]


def _log_row(server: SoakServer, seen: Seen, course: Course) -> Row:
    size = server.log.stat().st_size
    allowed = LOG_BYTES * (seen.answered + QUESTIONS) + TROUBLE_LOG_BYTES * (course.troubles.total() + 1)
    return _at_most("its log", size, "bytes", allowed)


def _at_most(name: str, value: float, unit: str, bar: float, *, note: str = "") -> Row:
    return Row(name=name, ours=value, unit=unit, ratio=value, bar=bar, direction="at most", note=note)


def _notes(course: Course, seen: Seen, troubles: Troubles) -> list[str]:
    told = ", ".join(f"{count} {what}" for what, count in seen.told.most_common())
    return [
        "troubles: " + ", ".join(f"{count} {name}" for name, count in sorted(course.troubles.items())),
        f"until right again: median {statistics.median([took_s for took_s, _ in course.recoveries_s] or [0]):.1f} s; "
        f"the server held {course.most_rss_bytes / 1e6:.0f} MB at most",
        *([f"told: {told}"] if told else []),
        *([f"left out: {', '.join(troubles.left_out)}"] if troubles.left_out else []),
        *([f"never over: {', '.join(course.stuck)}"] if course.stuck else []),
        *seen.bad,
    ]


if __name__ == "__main__":
    sys.exit(main())
