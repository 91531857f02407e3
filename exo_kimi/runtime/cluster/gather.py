"""Several pieces of work at once that succeed or fail as one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, Answer]], *, unless: asyncio.Future[Any]) -> list[Answer]:
    """Run coroutines at once; the first error ends the others, and so does an error in `unless`.

    Args:
        work: what to do.
        unless: a future that is done when all of it has become pointless; its result is an exception.

    Returns:
        What each returned.

    Raises:
        Exception: the first error, or the result of `unless`.
    """
    tasks = [asyncio.create_task(each) for each in work]
    waiting: set[asyncio.Future[Any]] = {*tasks}
    try:
        while waiting:
            done, _ = await asyncio.wait({*waiting, unless}, return_when=asyncio.FIRST_COMPLETED)
            if unless in done:
                raise unless.result()
            for task in done:
                task.result()
            waiting -= done
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
