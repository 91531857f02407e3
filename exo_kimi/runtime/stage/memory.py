"""How much memory a machine still has for caches, Metal's working-set limit on a Mac, free memory elsewhere; and which errors
say that there was none left.

It counts as if this stage had the machine to itself: the leader divides it among those that share one (see `capacity`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import mlx.core as mx

from exo_kimi.runtime.protocol.messages import FreeScope
from exo_kimi.runtime.reserve import host_free_bytes

MLX_OUT_OF_MEMORY = (
    "[malloc] Unable to allocate ",
    "[metal::malloc] Attempting to allocate ",
    "[metal::malloc] Resource limit (",
    "[METAL] Command buffer execution failed: Insufficient Memory",
)
"""How MLX's RuntimeErrors begin when memory is short. The same in 0.31.2, 0.32.0, 0.32.1 and its main branch.

Source: ml-explore/mlx, `backend/metal/allocator.cpp` and `backend/cuda/allocator.cpp` (`malloc`), `backend/metal/device.cpp`
and, in 0.31, `backend/metal/eval.cpp` (the command buffer, with Metal's `localizedDescription`). The CPU backend has no
words for it: the process ends by SIGSEGV.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """`free_bytes` of the machine as a whole (`host`), or of Metal's limit as if this process were alone (`process`)."""

    free_bytes: int
    scope: FreeScope


def free_memory() -> FreeMemory:
    """What could still be allocated now. Call it in the thread that does the MLX work."""
    if mx.metal.is_available():
        limit_bytes = int(mx.device_info()["max_recommended_working_set_size"])
        return FreeMemory(free_bytes=max(0, limit_bytes - mx.get_active_memory()), scope="process")
    return FreeMemory(free_bytes=host_free_bytes(), scope="host")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left: Python's (NumPy raises it too), the system's, or MLX's own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and str(error).startswith(MLX_OUT_OF_MEMORY)
    )
