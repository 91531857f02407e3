"""What a stage process tells of itself; shared by its two threads, which write different fields. It knows no socket."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from exo_kimi.runtime.protocol.messages import HelloAck, Progress
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.requests import StageState
from exo_kimi.runtime.stage.memory import FreeMemory, host_free_bytes
from exo_kimi.runtime.steps import NO_EPOCH


@dataclass(slots=True)
class StageStatus:
    """`newest_epoch` is written by the IO thread, the rest by the main thread. `busy_since_s` is when the current order was
    begun or, while loading, last made progress (monotonic); None when idle."""

    free: FreeMemory
    state: StageState = "starting"
    epoch: int = NO_EPOCH
    newest_epoch: int = NO_EPOCH
    busy_since_s: float | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    kv_bytes: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    sequences: int = 0

    def hello_ack(self, versions: Versions) -> HelloAck:
        """The answer to a Hello."""
        free = self.free
        if free.scope == "host":
            free = FreeMemory(free_bytes=host_free_bytes(), scope="host")  # others came and went since
        return HelloAck(
            exo_kimi=versions.exo_kimi,
            mlx=versions.mlx,
            mlx_lm=versions.mlx_lm,
            pid=os.getpid(),
            host=socket.gethostname(),
            held_bytes=self.active_bytes,
            free_bytes=free.free_bytes,
            free_scope=free.scope,
        )

    def progress(self) -> Progress:
        """A heartbeat."""
        busy_since_s = self.busy_since_s
        return Progress(
            state=self.state,
            epoch=self.epoch,
            busy_s=0.0 if busy_since_s is None else max(0.0, time.monotonic() - busy_since_s),
            loaded_bytes=self.loaded_bytes,
            total_bytes=self.total_bytes,
            kv_bytes=self.kv_bytes,
            active_bytes=self.active_bytes,
            peak_bytes=self.peak_bytes,
            sequences=self.sequences,
            pid=os.getpid(),
        )
