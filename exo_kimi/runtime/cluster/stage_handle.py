"""StageHandle: one stage as the leader sees it, its process or address, what was agreed with it, and how it is.

What ends a connection (a death, a silence) makes the handle `broken`: it must be disconnected and connected anew. What a stage
reports about a load or a step does not: its process lives and keeps its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq.asyncio

from exo_kimi.errors import (
    ExoKimiError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageStalledError,
    StageUnreachableError,
    machine_error,
)
from exo_kimi.runtime.cluster.capacity import StageMemory
from exo_kimi.runtime.cluster.child_process import ChildProcess, ensure_private
from exo_kimi.runtime.cluster.cluster_plan import StagePlan
from exo_kimi.runtime.cluster.options import ClusterOptions, RunSettings
from exo_kimi.runtime.cluster.stage_client import StageClient
from exo_kimi.runtime.pipeline import DiskBlocks
from exo_kimi.runtime.prefix_key import unpack_keys
from exo_kimi.runtime.protocol.messages import (
    BlocksChanged,
    Goodbye,
    HelloAck,
    Join,
    Joined,
    Loaded,
    Ping,
    Progress,
    encode_path,
)
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.requests import ExpertHealth, StageHealth, StageState
from exo_kimi.runtime.steps import NO_EPOCH, Step, StepResult
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.zmq_link import connect

logger = logging.getLogger(__name__)
BUSY_FACTOR = 4  # a step, or a load without progress, may take so many stall deadlines
GOODBYE_S = 3.0
EXIT_WAIT_S = 1.0
CONNECT_NEXT_S = 10.0  # for a stage to reach the one after it; a pair of them has a stall deadline more


class ConnectedStage:
    """A stage that answered the handshake; made by `StageHandle.connect`.

    Args:
        plan: what it is to hold.
        options: of the cluster.
        client: to it.
        hello: its answer.
    """

    def __init__(self, plan: StagePlan, options: ClusterOptions, client: StageClient, hello: HelloAck) -> None:
        self.hello = hello
        self.loaded: Loaded | None = None
        self.joined: Joined | None = None
        self._plan = plan
        self._options = options
        self._client = client

    async def load(self) -> Loaded:
        """Have the stage load its layers; it answers at once when it holds them.

        Raises:
            CheckpointError, RuntimeFault: as the stage reported it.
        """
        self.joined = None
        loaded = self.loaded = await self._client.ask(self._plan.load, Loaded, epoch=NO_EPOCH)
        return loaded

    async def join(self, epoch: int, next_address: str | None, *, block_tokens: int) -> Joined:
        """Have the stage end its sequences, keep their caches, and link to the next one.

        Raises:
            RuntimeFault: as the stage reported it.
        """
        directory = self._options.prefix_directory
        join = Join(
            epoch=epoch,
            keep=True,
            next_address=next_address,
            link=self._options.link,
            block_tokens=block_tokens,
            prefix_disk_bytes=self._options.prefix_disk_bytes,
            prefix_directory=None if directory is None else encode_path(directory),
        )
        joined = self.joined = await self._client.ask(join, Joined, epoch=epoch)
        return joined

    def memory(self) -> StageMemory:
        """What the stage last said of its memory; before loading, `weights_bytes` is what that will take."""
        said = self.joined or self.hello
        return StageMemory(
            stage=self._plan.load.stage,
            host=self.hello.host,
            free_bytes=said.free_bytes,
            free_scope=said.free_scope,
            active_bytes=self.loaded.weights_bytes if self.loaded is not None else 0,
            weights_bytes=max(0, self._plan.bytes_with(self.hello.expert_cache_bytes) - self.hello.held_bytes),
            kv_bytes_per_token=self.loaded.kv_bytes_per_token if self.loaded is not None else 1,
            waiting_bytes=self.loaded.waiting_bytes if self.loaded is not None else 0,
            state_bytes=self.loaded.state_bytes if self.loaded is not None else 0,
            snapshot_bytes=self.loaded.snapshot_bytes if self.loaded is not None else 0,
            kept_bytes=self.joined.kept_bytes if self.joined is not None else 0,
        )


class StageHandle:
    """One stage through all its starts and connections.

    Args:
        plan: what it holds and where.
        settings: of this run.
        context: for its socket.
        on_result: takes every StepResult.
        on_blocks: takes what changed on the stage's disk.
        on_fault: takes what went wrong while nothing was asked of the stage, with the epoch it is about (None: any).
    """

    def __init__(
        self,
        plan: StagePlan,
        settings: RunSettings,
        context: zmq.asyncio.Context,
        *,
        on_result: Callable[[StepResult], None],
        on_blocks: Callable[[DiskBlocks], None],
        on_fault: Callable[[RuntimeFault, int | None], None],
    ) -> None:
        self.plan = plan
        self.stage = plan.load.stage
        self.broken = False
        self._settings = settings
        self._context = context
        self._on_result = on_result
        self._on_blocks = on_blocks
        self._on_fault = on_fault
        self._last_error: ExoKimiError | None = None
        self._client: StageClient | None = None
        self._connected: ConnectedStage | None = None
        self._child: ChildProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._address: Address | None = plan.remote
        self._starts = 0

    @property
    def address(self) -> str:
        """Where the leader reaches it."""
        return str(self._address) if self._address is not None else "local"

    @property
    def from_previous(self) -> str:
        """Where the stage before it reaches it."""
        return str(self.plan.from_previous) if self.plan.from_previous is not None else self.address

    async def connect(self) -> ConnectedStage:
        """Start the process if it is a local one, link to it and exchange versions; if that is done, what came of it.

        Raises:
            StageDiedError, StageUnreachableError, KeyMismatchError, ProtocolError: it cannot be had.
        """
        if self._connected is not None:
            return self._connected
        try:
            connected = self._connected = await self._connect()
            return connected
        except BaseException as error:
            failure = self._as_failure(error)
            if failure is not None:
                self._last_error = failure
            await self.disconnect()  # no process without a link to it
            if failure is None or failure is error:
                raise
            raise failure from error

    def _as_failure(self, error: BaseException) -> ExoKimiError | None:
        """Why there is no connection; None for what only ends the waiting. Nothing but our own errors leaves this object."""
        if isinstance(error, ExoKimiError) or not isinstance(error, Exception):
            return error if isinstance(error, ExoKimiError) else None
        what = f"stage {self.stage} could not be started"
        if (known := machine_error(error)) is not None:
            return StageDiedError(what, stage=self.stage, found=known.what, where=known.where, fix=known.fix)
        logger.error("%s", what, exc_info=error)
        return StageError(f"{what}: {type(error).__name__}: {error}", stage=self.stage)

    async def send(self, message: Step | Goodbye) -> None:
        """Queue what needs no answer from this stage.

        Raises:
            RuntimeFault: the link is lost, or no frame can hold the message.
        """
        if self._client is None:
            raise StageUnreachableError(f"stage {self.stage} is not connected", stage=self.stage, where=self.address)
        await self._client.send(message)

    async def ping(self) -> None:
        """Say that the leader lives, once the stage knows it; a lost link is told by its own reader."""
        if self._client is not None and self._connected is not None:
            with contextlib.suppress(RuntimeFault):
                await self._client.send(Ping())

    def extend_deadline(self, gap_s: float) -> None:
        """Do not count, as silence, a time in which the leader itself was suspended."""
        if self._client is not None:
            self._client.extend_deadline(gap_s)

    def check_deadlines(self) -> None:
        """Break with a stage that is silent, or busy with one thing, for too long."""
        if self._client is None or self.broken:
            return
        stall_s = self._settings.options.stall_s
        silent_s = self._client.silent_s
        progress = self._client.progress
        busy_s = progress.busy_s if progress is not None else 0.0
        if silent_s > stall_s:
            what, limit_s = f"stage {self.stage} is silent for {silent_s:.1f} s", stall_s
        elif busy_s > BUSY_FACTOR * stall_s:
            what, limit_s = f"stage {self.stage} is at one thing for {busy_s:.1f} s", BUSY_FACTOR * stall_s
        elif self._client.unanswered_s > (owed_s := 2 * stall_s + CONNECT_NEXT_S):
            what, limit_s = f"stage {self.stage} lives and does not answer", owed_s
        else:
            return
        fix = None if self._child is not None else "look at `exo-kimi stage` there"
        self._mark_broken(StageStalledError(what, expected=f"an answer in {limit_s:g} s", where=self.address, fix=fix))

    def check_socket(self) -> None:
        """Break with a local stage whose socket file is gone (the system tidies up temporary folders): a neighbour that starts
        anew could not reach it."""
        path = self._address.path if self._address is not None else None
        if self._connected is not None and path is not None and not self.broken and not Path(path).exists():
            self._last_error = StageUnreachableError("its socket file was deleted", stage=self.stage, where=path)
            logger.warning("stage %d: its socket file was deleted: %s", self.stage, path)
            self.broken = True

    @property
    def is_idle(self) -> bool:
        """Whether the stage has nothing to do, as it last said."""
        return self._client is not None and self._client.is_idle

    def drop_link(self) -> None:
        """Close the link and let a local process live: `connect` links to it anew."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._connected = None

    async def disconnect(self) -> None:
        """Close the link, and end the process if it is a local one."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self.drop_link()
        if self._child is not None:
            child, self._child = self._child, None
            await child.end(grace_s=0)
            if self._address is not None and self._address.path is not None:
                with contextlib.suppress(OSError):  # the next one listens elsewhere
                    Path(self._address.path).unlink()
        self.broken = False

    async def close(self) -> None:
        """End a local process; say goodbye to a remote one, which gives its memory back and waits for the next leader."""
        self.broken = True  # whatever ends from now on is no fault
        if self._child is not None:
            await self._child.end(grace_s=GOODBYE_S)
        elif self._client is not None:
            with contextlib.suppress(RuntimeFault):
                await self.send(Goodbye())
                await asyncio.sleep(0.05)  # lingering is off: the frame needs a moment to leave
        await self.disconnect()

    def health(self) -> StageHealth:
        """How the stage is, as it last said."""
        load = self.plan.load
        progress = self._client.progress if self._client is not None else None
        loaded = self._connected.loaded if self._connected is not None else None
        return StageHealth(
            stage=load.stage,
            address=self.address,
            state=self._state(),
            start_layer=load.start_layer,
            end_layer=load.end_layer,
            silent_s=self._client.silent_s if self._client is not None else 0.0,
            pid=self._pid(),
            loaded_bytes=progress.loaded_bytes if progress is not None else 0,
            total_bytes=progress.total_bytes if progress is not None else 0,
            weights_bytes=loaded.weights_bytes if loaded is not None else 0,
            kv_bytes=progress.kv_bytes if progress is not None else 0,
            peak_bytes=progress.peak_bytes if progress is not None else 0,
            sequences=progress.sequences if progress is not None else 0,
            restarts=max(0, self._starts - 1),
            compute_s=progress.compute_s if progress is not None else 0.0,
            last_error=None if self._last_error is None else self._last_error.what,
            experts=_expert_health(progress),
        )

    def _pid(self) -> int | None:
        if self._child is not None:
            return self._child.pid
        return self._connected.hello.pid if self._connected is not None else None

    def _state(self) -> StageState:
        client = self._client
        if self.broken:
            return "stalled" if isinstance(self._last_error, StageStalledError) else "dead"
        if client is None:
            return "dead" if self._last_error is not None and self._child is None else "starting"
        if client.silent_s > self._settings.options.stall_s / 2:
            return "stalled"
        if self._connected is not None and self._connected.joined is not None:
            return "ready"
        state = None if client.progress is None else client.progress.state
        return state if state in ("loading", "warming") else "starting"

    async def _connect(self) -> ConnectedStage:
        settings, remote = self._settings, self.plan.remote
        if self._child is None or self._address is None:
            self._starts += 1
            self._address = remote if remote is not None else await self._start_child()
        address = self._address
        lost = remote is not None and self._starts > 1
        deadline_s = settings.options.reconnect_s if lost else settings.options.connect_s
        key = settings.key if remote is not None else None
        link = await connect(self._context, address, key=key, deadline_s=deadline_s)
        client = self._client = StageClient(
            link,
            self.stage,
            on_result=self._on_client_result,
            on_fault=self._on_client_fault,
            on_lost=self._on_client_lost,
        )
        hello = await client.handshake(settings.hello(), deadline_s=deadline_s)
        theirs = Versions(exo_kimi=hello.exo_kimi, mlx=hello.mlx, mlx_lm=hello.mlx_lm)
        if theirs != settings.versions:
            logger.warning("stage %d at %s runs %s, this side %s", self.stage, address, theirs, settings.versions)
        return ConnectedStage(self.plan, settings.options, client, hello)

    async def _start_child(self) -> Address:
        settings = self._settings
        ensure_private(settings.socket_directory)
        path = settings.socket_directory / f"{self.stage}-{self._starts}"
        self._child, address = await ChildProcess.start(
            f"ipc://{path}", key=settings.key, name=f"stage {self.stage}", command=settings.options.child_command
        )
        self._watching = asyncio.create_task(self._watch_child(self._child))
        return address

    def _on_client_result(self, message: StepResult | BlocksChanged) -> None:
        if isinstance(message, StepResult):
            self._on_result(message)
            return
        added, gone = unpack_keys(message.added), unpack_keys(message.gone)
        self._on_blocks(DiskBlocks(epoch=message.epoch, stage=self.stage, added=added, gone=gone))

    def _on_client_fault(self, error: ExoKimiError, epoch: int) -> None:
        self._last_error = error
        fault = error if isinstance(error, RuntimeFault) else StageError(str(error), stage=self.stage)
        self._on_fault(fault, epoch)

    def _on_client_lost(self, error: RuntimeFault) -> None:
        if self._child is not None and isinstance(error, StageDiedError):
            # The end of the process is about to say more.
            asyncio.get_running_loop().call_later(EXIT_WAIT_S, self._mark_broken_if, self._child, error)
        else:
            self._mark_broken(error)

    def _mark_broken_if(self, child: ChildProcess, error: RuntimeFault) -> None:
        if self._child is child:
            self._mark_broken(error)

    async def _watch_child(self, child: ChildProcess) -> None:
        self._mark_broken(await child.died())

    def _mark_broken(self, error: RuntimeFault) -> None:
        if self.broken:
            return
        self.broken = True
        error.stage = self.stage
        self._last_error = error
        if self._child is not None:
            self._child.kill()
        if self._client is None or not self._client.fail(error):
            self._on_fault(error, None)


def _expert_health(progress: Progress | None) -> ExpertHealth | None:
    if progress is None or progress.experts is None:
        return None
    return ExpertHealth(**msgspec.structs.asdict(progress.experts))
