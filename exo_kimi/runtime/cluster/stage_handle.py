"""One stage as the leader sees it: its process or address, what was agreed with it, and how it is. It decides nothing.

What ends a conversation (a death, a silence) makes the member `broken`: it must be dropped and connected anew. What a stage
reports about a load or a step does not: its process lives and keeps its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from exo_kimi.errors import (
    ExoKimiError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageStalledError,
    StageUnreachableError,
)
from exo_kimi.runtime.cluster.capacity import StageMemory
from exo_kimi.runtime.cluster.child_process import ChildProcess
from exo_kimi.runtime.cluster.cluster_plan import StagePlan
from exo_kimi.runtime.cluster.options import RunSettings
from exo_kimi.runtime.cluster.stage_client import StageClient
from exo_kimi.runtime.pipeline import DiskBlocks
from exo_kimi.runtime.prefix_key import unpack_keys
from exo_kimi.runtime.protocol.messages import BlocksChanged, Goodbye, HelloAck, Join, Joined, Loaded, Ping
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.requests import StageHealth, StageState
from exo_kimi.runtime.steps import NO_EPOCH, Step, StepResult
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.zmq_link import connect

logger = logging.getLogger(__name__)
BUSY_FACTOR = 4  # a step, or a load without progress, may take so many stall deadlines
GOODBYE_S = 3.0
EXIT_WAIT_S = 1.0


class StageHandle:
    """One stage.

    Args:
        plan: what it holds and where.
        terms: of the cluster.
        context: for its socket.
        on_result: takes every StepResult.
        on_blocks: takes what changed on the stage's disk.
        on_fault: takes what went wrong while nothing was asked of the stage, with the epoch it is about (None: any).
    """

    def __init__(
        self,
        plan: StagePlan,
        terms: RunSettings,
        context: zmq.asyncio.Context,
        *,
        on_result: Callable[[StepResult], None],
        on_blocks: Callable[[DiskBlocks], None],
        on_fault: Callable[[RuntimeFault, int | None], None],
    ) -> None:
        self.plan = plan
        self.stage = plan.load.stage
        self.broken = False
        self.loaded: Loaded | None = None
        self._hello: HelloAck | None = None
        self._joined: Joined | None = None
        self._terms = terms
        self._context = context
        self._on_result = on_result
        self._on_blocks = on_blocks
        self._on_fault = on_fault
        self._last_error: ExoKimiError | None = None
        self._conversation: StageClient | None = None
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

    async def connect(self) -> None:
        """Start the process if it is a local one, link to it and exchange versions; nothing if that is done.

        Raises:
            StageDiedError, StageUnreachableError, KeyMismatchError, ProtocolError: it cannot be had.
        """
        if self._conversation is not None:
            return
        try:
            await self._connect()
        except BaseException as error:
            if isinstance(error, ExoKimiError):
                self._last_error = error
            await self.drop()  # no process without a link to it
            raise

    async def load(self) -> None:
        """Have the stage load its layers; it answers at once when it holds them.

        Raises:
            CheckpointError, RuntimeFault: as the stage reported it.
        """
        self._joined = None
        self.loaded = await self._talk().ask(self.plan.load, Loaded, epoch=NO_EPOCH)

    async def join(self, epoch: int, next_address: str | None, *, block_tokens: int) -> Joined:
        """Have the stage drop its sequences and link to the next one.

        Raises:
            RuntimeFault: as the stage reported it.
        """
        options = self._terms.options
        join = Join(
            epoch=epoch,
            next_address=next_address,
            link=options.link,
            block_tokens=block_tokens,
            prefix_disk_bytes=options.prefix_disk_bytes,
            prefix_directory=options.prefix_directory,
        )
        joined = self._joined = await self._talk().ask(join, Joined, epoch=epoch)
        return joined

    async def send(self, message: Step | Goodbye) -> None:
        """Queue what needs no answer from this stage.

        Raises:
            RuntimeFault: the link is lost, or no frame can hold the message.
        """
        await self._talk().send(message)

    async def ping(self) -> None:
        """Say that the leader lives, once the stage knows it; a lost link is told by its own reader."""
        if self._conversation is not None and self._hello is not None:
            with contextlib.suppress(RuntimeFault):
                await self._conversation.send(Ping())

    def forgive(self, gap_s: float) -> None:
        """Do not count a time in which the leader itself was suspended."""
        if self._conversation is not None:
            self._conversation.forgive(gap_s)

    def check(self) -> None:
        """Break with a stage that is silent, or busy with one thing, for too long."""
        if self._conversation is None or self.broken:
            return
        stall_s = self._terms.options.stall_s
        silent_s = self._conversation.silent_s
        progress = self._conversation.progress
        busy_s = progress.busy_s if progress is not None else 0.0
        if silent_s > stall_s:
            what, limit_s = f"stage {self.stage} is silent for {silent_s:.1f} s", stall_s
        elif busy_s > BUSY_FACTOR * stall_s:
            what, limit_s = f"stage {self.stage} is at one thing for {busy_s:.1f} s", BUSY_FACTOR * stall_s
        else:
            return
        fix = None if self._child is not None else "look at `exo-kimi stage` there"
        self._break(StageStalledError(what, expected=f"an answer in {limit_s:g} s", where=self.address, fix=fix))

    async def drop(self) -> None:
        """Forget the conversation, and end the process if it is a local one."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
        if self._child is not None:
            child, self._child = self._child, None
            await child.end(grace_s=0)
            if self._address is not None and self._address.path is not None:
                Path(self._address.path).unlink(missing_ok=True)  # the next one listens elsewhere
        self._hello = self.loaded = self._joined = None
        self.broken = False

    async def close(self) -> None:
        """End a local process; say goodbye to a remote one, which gives its memory back and waits for the next leader."""
        self.broken = True  # whatever ends from now on is no fault
        if self._child is not None:
            await self._child.end(grace_s=GOODBYE_S)
        elif self._conversation is not None:
            with contextlib.suppress(RuntimeFault):
                await self.send(Goodbye())
                await asyncio.sleep(0.05)  # lingering is off: the frame needs a moment to leave
        await self.drop()

    def memory(self) -> StageMemory:
        """What the stage last said of its memory; before loading, `weights_bytes` is what that will take."""
        assert self._hello is not None
        said = self._joined or self._hello
        return StageMemory(
            stage=self.stage,
            host=self._hello.host,
            free_bytes=said.free_bytes,
            free_scope=said.free_scope,
            active_bytes=self.loaded.weights_bytes if self.loaded is not None else 0,
            weights_bytes=max(0, self.plan.resident_bytes - self._hello.held_bytes),
            kv_bytes_per_token=self.loaded.kv_bytes_per_token if self.loaded is not None else 1,
        )

    def health(self) -> StageHealth:
        """How the stage is, as it last said."""
        load = self.plan.load
        progress = self._conversation.progress if self._conversation is not None else None
        return StageHealth(
            stage=load.stage,
            address=self.address,
            state=self._state(),
            start_layer=load.start_layer,
            end_layer=load.end_layer,
            silent_s=self._conversation.silent_s if self._conversation is not None else 0.0,
            pid=self._child.pid if self._child is not None else self._hello.pid if self._hello is not None else None,
            loaded_bytes=progress.loaded_bytes if progress is not None else 0,
            total_bytes=progress.total_bytes if progress is not None else 0,
            weights_bytes=self.loaded.weights_bytes if self.loaded is not None else 0,
            kv_bytes=progress.kv_bytes if progress is not None else 0,
            peak_bytes=progress.peak_bytes if progress is not None else 0,
            sequences=progress.sequences if progress is not None else 0,
            restarts=max(0, self._starts - 1),
            last_error=None if self._last_error is None else self._last_error.what,
        )

    def _state(self) -> StageState:
        talk = self._conversation
        if self.broken:
            return "stalled" if isinstance(self._last_error, StageStalledError) else "dead"
        if talk is None:
            return "dead" if self._last_error is not None and self._child is None else "starting"
        if talk.silent_s > self._terms.options.stall_s / 2:
            return "stalled"
        if self._joined is not None:
            return "ready"
        return "loading" if talk.progress is not None and talk.progress.state == "loading" else "starting"

    async def _connect(self) -> None:
        terms = self._terms
        self._starts += 1
        if self.plan.remote is None:
            assert terms.socket_directory is not None
            path = terms.socket_directory / f"{self.stage}-{self._starts}"
            self._child, self._address = await ChildProcess.start(
                f"ipc://{path}", key=terms.key, name=f"stage {self.stage}", command=terms.options.child_command
            )
            self._watching = asyncio.create_task(self._watch_child(self._child))
        assert self._address is not None
        key = terms.key if self.plan.remote is not None else None
        lost = self.plan.remote is not None and self._starts > 1
        deadline_s = terms.options.reconnect_s if lost else terms.options.connect_s
        link = await connect(self._context, self._address, key=key, deadline_s=deadline_s)
        talk = StageClient(
            link, self.stage, on_result=self._hear_result, on_fault=self._hear_fault, on_lost=self._hear_loss
        )
        self._conversation = talk
        ack = self._hello = await talk.greet(terms.hello(), deadline_s=deadline_s)
        theirs = Versions(exo_kimi=ack.exo_kimi, mlx=ack.mlx, mlx_lm=ack.mlx_lm)
        if theirs != terms.versions:
            logger.warning("stage %d at %s runs %s, this side %s", self.stage, self.address, theirs, terms.versions)

    def _talk(self) -> StageClient:
        if self._conversation is None:
            raise StageUnreachableError(f"stage {self.stage} is not connected", stage=self.stage, where=self.address)
        return self._conversation

    def _hear_result(self, message: StepResult | BlocksChanged) -> None:
        if isinstance(message, StepResult):
            self._on_result(message)
            return
        added, gone = unpack_keys(message.added), unpack_keys(message.gone)
        self._on_blocks(DiskBlocks(epoch=message.epoch, stage=self.stage, added=added, gone=gone))

    def _hear_fault(self, error: ExoKimiError, epoch: int) -> None:
        self._last_error = error
        fault = error if isinstance(error, RuntimeFault) else StageError(str(error), stage=self.stage)
        self._on_fault(fault, epoch)

    def _hear_loss(self, error: RuntimeFault) -> None:
        if self._child is not None and isinstance(error, StageDiedError):
            # The end of the process is about to say more.
            asyncio.get_running_loop().call_later(EXIT_WAIT_S, self._break_with, self._child, error)
        else:
            self._break(error)

    def _break_with(self, child: ChildProcess, error: RuntimeFault) -> None:
        if self._child is child:
            self._break(error)

    async def _watch_child(self, child: ChildProcess) -> None:
        self._break(await child.died())

    def _break(self, error: RuntimeFault) -> None:
        if self.broken:
            return
        self.broken = True
        error.stage = self.stage
        self._last_error = error
        if self._child is not None:
            self._child.kill()
        if self._conversation is None or not self._conversation.fail(error):
            self._on_fault(error, None)
