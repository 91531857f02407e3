"""A stage as a process: `python -m exo_kimi.runtime.stage` for a leader's child, `serve_stage` for `exo-kimi stage`.

The main thread does the MLX work, a second one the sockets. A child lives no longer than its parent: it holds one end of a
socket pair, and the end of the other end is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.index import open_index
from exo_kimi.errors import ExoKimiError, machine_error
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.runtime.end_signals import EndSignals
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.stage.backend import CheckpointLayers, MlxBackend
from exo_kimi.runtime.stage.compute_thread import Backend, Order, StageCompute, StageStatus
from exo_kimi.runtime.stage.server import StageServer
from exo_kimi.runtime.threads import start_daemon
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, ClusterKey, default_key_file, key_to_listen

logger = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 0.0005  # a step's result is not to wait 5 ms for the thread that prepares the next step


def _say(line: str) -> None:
    print(line, flush=True)  # also into a pipe: somebody waits for the address


def serve_stage(
    listen: str,
    *,
    model: str | None,
    key_file: Path | None,
    environment_key: str | None,
    say: Callable[[str], None] = _say,
    show_key: bool = True,
    expert_cache: ExpertCache | None = None,
    expert_trace: Path | None = None,
    draft: Path | None = None,
) -> None:
    """Serve leaders one after another until Ctrl-C: the body of `exo-kimi stage`.

    Args:
        listen: address; on one that other machines reach, a key is needed, and made when there is none.
        model: this machine's checkpoint directory; None takes the path that the leader names.
        key_file: the cluster key's file; written when it does not exist yet.
        environment_key: the text of EXO_KIMI_KEY, if set.
        say: takes lines for the user.
        show_key: say a key that was made now. Not where the lines go into a log that others may read.
        expert_cache: what this machine may hold of the routed experts; None leaves it to the leader, who holds all.
        expert_trace: the file for which experts are asked for; None writes none.
        draft: this machine's directory of the draft head; None takes the path that the leader names.

    Raises:
        CheckpointError: `model` is no checkpoint, or `draft` no head.
        AddressError, UsageError: see `parse_address` and `find_key`; the port is in use.
    """
    address = parse_address(listen, option="--listen", listen=True)
    key, is_new = key_to_listen(address, key_file, environment_key)

    def announce(bound: Address) -> None:
        say(f"listening on {bound}, waiting for a leader")
        if key is not None:
            if is_new:
                say(f"made a new cluster key: {key_file or default_key_file()}")
            host = socket.gethostname() if bound.is_wildcard else bound.host
            reachable = Address(host, bound.port)
            given = f"{ENVIRONMENT_NAME}={shlex.quote(key.secret.decode())} " if is_new and show_key else ""
            say(f"on the other machine: {given}exo-kimi serve DIR --stage {reachable}")

    directory = Path(model).expanduser() if model is not None else None
    if directory is not None:
        open_index(directory)  # what is no checkpoint is told now and not when a leader comes
    if draft is not None:
        resolve_draft(draft)
    # A service manager's SIGTERM is as good as Ctrl-C, which a shell's background job would ignore.
    with EndSignals(signal.default_int_handler):
        _serve(
            address,
            lambda: MlxBackend(
                CheckpointLayers(directory, alone=True, expert_cache=expert_cache, draft_directory=draft),
                expert_trace=expert_trace,
            ),
            announce=announce,
            key=key,
            next_key=key,
            leader_may_vanish=True,
            expert_cache=expert_cache,
        )


def main(argv: Sequence[str] | None = None, *, make_backend: Callable[[], Backend] | None = None) -> int:
    """Run as a leader's child.

    Args:
        argv: see `--help`.
        make_backend: does the stage's work; tests put others here.
    """
    parser = argparse.ArgumentParser(prog="exo_kimi.runtime.stage", description="a stage of a local leader")
    parser.add_argument("--listen", required=True, help="address that this machine alone can reach")
    parser.add_argument("--parent-fd", required=True, type=int, help="socket to the leader: key in, address out")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the leader ends its children
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    parent = socket.socket(fileno=options.parent_fd)
    key: ClusterKey | None = None
    if secret := json.loads(parent.makefile("r").readline() or "null"):
        key = replace(ClusterKey.from_text(secret[0], where="the leader"), explicit=secret[1])

    def announce(bound: Address) -> None:
        parent.sendall(json.dumps({"address": str(bound)}).encode() + b"\n")

    try:
        listen = parse_address(options.listen, option="--listen", listen=True)
        _outlive_nobody(parent, listen)
        # It listens where this user alone can reach it: the key is for the stage after it.
        make = make_backend or (lambda: MlxBackend(CheckpointLayers(None, alone=True)))
        _serve(listen, make, announce=announce, key=None, next_key=key, leader_may_vanish=False)
    except Exception as error:
        known = error if isinstance(error, ExoKimiError) else machine_error(error)
        if known is None:
            raise
        logger.error("%s", known)
        return 1
    return 0


def _serve(
    listen: Address,
    make_backend: Callable[[], Backend],
    *,
    announce: Callable[[Address], None],
    key: ClusterKey | None,
    next_key: ClusterKey | None,
    leader_may_vanish: bool,
    expert_cache: ExpertCache | None = None,
) -> None:
    backend = make_backend()
    orders: SimpleQueue[Order] = SimpleQueue()
    own_bytes = expert_cache.budget_bytes if expert_cache is not None else None
    status = StageStatus(free=backend.free(), expert_cache_bytes=own_bytes)
    server = StageServer(
        listen,
        key=key,
        next_key=next_key,
        orders=orders,
        status=status,
        versions=Versions.installed(),
        leader_may_vanish=leader_may_vanish,
    )

    def serve() -> None:
        try:
            server.run()
        except Exception as error:
            known = machine_error(error)
            logger.error("the sockets failed: %s", known or error, exc_info=error if known is None else None)
            os._exit(70)  # without sockets nobody can reach the main thread any more
        orders.put(None)

    serving_ended = start_daemon(serve, name="stage-io")
    announce(server.bound.result())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        StageCompute(backend, status, server.post).run(orders)
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        server.stop()
        serving_ended.wait(2)


def _outlive_nobody(parent: socket.socket, listen: Address) -> None:
    """End this process, whatever it is doing, when the parent is gone: also after a kill -9 of the parent."""

    def watch() -> None:
        while parent.recv(4096):
            pass
        if listen.path is not None:
            with contextlib.suppress(OSError):  # the parent may have done it, or a sibling is still to do it
                Path(listen.path).unlink(missing_ok=True)
                Path(listen.path).parent.rmdir()
        os._exit(0)

    start_daemon(watch, name="parent-watch")
