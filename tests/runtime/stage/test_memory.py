"""An out-of-memory is told by its class or by MLX's own words, not by a word that any message may hold."""

from __future__ import annotations

import errno
from pathlib import Path

import mlx.core as mx
import pytest

from exo_kimi.errors import StageError, StageOutOfMemoryError
from exo_kimi.runtime.stage.memory import MLX_OUT_OF_MEMORY, is_out_of_memory
from exo_kimi.runtime.stage.worker import as_fault


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[malloc] Unable to allocate 1099511627776 bytes."),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9 bytes."
        ),
        RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
        ),
    ],
)
def test_no_memory_is_told_as_such(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert isinstance(as_fault(error, stage=1), StageOutOfMemoryError)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the plan's layers allocate no stage"),
        RuntimeError("[matmul] Last dimension of first input with shape (1,2) must match: malloc is not at fault"),
        RuntimeError("the tokenizer ran out of memory tokens"),
        RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error."),
        OSError(errno.ENOSPC, "cannot allocate space"),
        KeyError("[malloc] Unable to allocate 1 bytes."),
    ],
)
def test_a_word_of_memory_in_a_message_is_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert type(as_fault(error, stage=1)) is StageError


@pytest.mark.skipif(not mx.metal.is_available(), reason="the words are in MLX's Metal backend")
def test_the_installed_mlx_has_these_words() -> None:
    library = b"".join(path.read_bytes() for path in (Path(mx.__file__).parent / "lib").glob("libmlx.*"))
    ours = [words.removesuffix(": Insufficient Memory") for words in MLX_OUT_OF_MEMORY]  # Metal's own
    assert [words for words in ours if words.strip().encode() not in library] == []
