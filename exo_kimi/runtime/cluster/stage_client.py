"""StageClient: the leader's link with one stage.

Requests get their response, what comes unasked goes to callbacks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from exo_kimi.errors import (
    ExoKimiError,
    ProtocolError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageUnreachableError,
)
from exo_kimi.runtime.protocol.faults import from_message
from exo_kimi.runtime.protocol.frames import Message, decode, encode
from exo_kimi.runtime.protocol.messages import (
    BlocksChanged,
    Hello,
    HelloAck,
    Joined,
    Loaded,
    Progress,
    Refused,
    StageFault,
)
from exo_kimi.runtime.steps import NO_EPOCH, StepResult
from exo_kimi.runtime.transport.link import Link

logger = logging.getLogger(__name__)
Response = TypeVar("Response", bound=HelloAck | Loaded | Joined)
RETRY_S = 0.5


class _Request(Generic[Response]):
    """A request that waits for a response of one class, about one epoch."""

    def __init__(self, answer: type[Response], epoch: int) -> None:
        self.epoch = epoch
        self.asked_s = time.monotonic()
        self.response: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answer: type[Response] = answer

    def take(self, message: Message) -> bool:
        """Whether a message is the response."""
        if not isinstance(message, self._answer) or _epoch_of(message) != self.epoch:
            return False
        if not self.response.done():
            self.response.set_result(message)
        return True


class StageClient:
    """One stage, from the link's handshake to its loss; one request at a time.

    Args:
        link: to the stage.
        stage: its index.
        on_result: takes every StepResult, and what the stage tells of its disk.
        on_fault: takes an error that the stage reports unasked, with the epoch it is about.
        on_lost: takes the reason when the link is lost or the other side talks nonsense.
    """

    def __init__(
        self,
        link: Link,
        stage: int,
        *,
        on_result: Callable[[StepResult | BlocksChanged], None],
        on_fault: Callable[[ExoKimiError, int], None],
        on_lost: Callable[[RuntimeFault], None],
    ) -> None:
        self.progress: Progress | None = None
        self._link = link
        self._stage = stage
        self._on_result = on_result
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._request: _Request[Any] | None = None
        self._last_frame_s = time.monotonic()
        self._reading = asyncio.create_task(self._read())

    @property
    def silent_s(self) -> float:
        """Time since the last frame."""
        return time.monotonic() - self._last_frame_s

    @property
    def is_idle(self) -> bool:
        """Whether the stage has nothing to do, as it last said."""
        return self.progress is not None and self.progress.busy_s == 0

    @property
    def unanswered_s(self) -> float:
        """For how long an idle stage has owed the response to a request; 0 while it is busy or owes none."""
        return time.monotonic() - self._request.asked_s if self._request is not None and self.is_idle else 0.0

    def extend_deadline(self, gap_s: float) -> None:
        """Do not count, as silence, a time in which this side was suspended."""
        self._last_frame_s += gap_s
        if self._request is not None:
            self._request.asked_s += gap_s

    async def send(self, message: Message) -> None:
        """Queue what needs no answer.

        Raises:
            RuntimeFault: the link is lost, or no frame can hold the message.
        """
        self._link.send(encode(message))

    async def ask(self, message: Message, answer: type[Response], *, epoch: int) -> Response:
        """Send a question and wait for its answer, one at a time. Only what is about `epoch` counts.

        Raises:
            ExoKimiError: what the stage answered instead, or the loss of the link.
        """
        request = _Request(answer, epoch)
        self._request = request
        try:
            await self.send(message)
            return await request.response
        finally:
            self._request = None

    async def handshake(self, hello: Hello, *, deadline_s: float) -> HelloAck:
        """Introduce this side; a stage that still serves another leader is asked again until the deadline.

        Raises:
            StageUnreachableError: no answer, or still another leader.
            ProtocolError: another version.
        """
        until_s = time.monotonic() + deadline_s
        while True:
            try:
                async with asyncio.timeout(deadline_s):
                    return await self.ask(hello, HelloAck, epoch=NO_EPOCH)
            except StageUnreachableError:
                if time.monotonic() > until_s:
                    raise
                await asyncio.sleep(RETRY_S)
            except TimeoutError:
                what = f"stage {self._stage} does not answer"
                raise StageUnreachableError(what, stage=self._stage, where=self._link.address) from None

    def fail(self, error: ExoKimiError) -> bool:
        """Answer what is asked, if anything is, with an error."""
        if self._request is None or self._request.response.done():
            return False
        self._request.response.set_exception(error)
        return True

    def close(self) -> None:
        """Stop listening and drop the link."""
        self._reading.cancel()
        self._link.close()

    async def _read(self) -> None:
        try:
            while True:
                message = decode(await self._link.receive())
                self._last_frame_s = time.monotonic()
                self._on_frame(message)
        except ProtocolError as error:
            error.stage = self._stage
            self._on_lost(error)
        except StageUnreachableError:
            what = f"stage {self._stage}: the connection was lost"
            self._on_lost(StageDiedError(what, stage=self._stage, where=self._link.address))
        except Exception as error:
            logger.exception("stage %d: reading its messages failed", self._stage)
            self._on_lost(StageError(f"stage {self._stage}: reading its messages failed: {error!r}", stage=self._stage))

    def _on_frame(self, message: Message) -> None:
        if isinstance(message, StepResult | BlocksChanged):
            self._on_result(message)
        elif isinstance(message, Progress):
            self.progress = message
        elif isinstance(message, StageFault):
            error = from_message(message, stage=self._stage, address=str(self._link.address))
            if self._request is None or self._request.epoch != message.epoch or not self.fail(error):
                self._on_fault(error, message.epoch)
        elif isinstance(message, Refused):
            cls = StageUnreachableError if message.retry else ProtocolError
            refusal = cls(f"stage {self._stage}: {message.message}", stage=self._stage, where=self._link.address)
            # Unasked, it means that the stage has given this leader up.
            if not self.fail(refusal):
                self._on_lost(refusal)
        elif self._request is None or not self._request.take(message):
            # A response to what was asked before a fault.
            logger.debug("stage %d sent a late %s", self._stage, type(message).__name__)


def _epoch_of(message: Message) -> int:
    return message.epoch if isinstance(message, Joined) else NO_EPOCH
