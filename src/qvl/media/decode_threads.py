"""Threads for work on pictures, so many at a time as the processors and the memory can bear."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_limiters: Final[anyio.lowlevel.RunVar[tuple[anyio.CapacityLimiter, anyio.CapacityLimiter]]] = anyio.lowlevel.RunVar(
    "qvl.media.limiters"
)


async def in_worker(work: Callable[[], T], *, large: bool = False) -> T:
    """Runs CPU work in a thread; two limiters an event loop, so that many uploads cannot take every thread.

    Large pictures have one of their own, behind which the others need not wait.
    """
    try:
        ordinary, one = _limiters.get()
    except LookupError:
        ordinary, one = anyio.CapacityLimiter(max(2, os.cpu_count() or 2)), anyio.CapacityLimiter(1)
        _limiters.set((ordinary, one))
    limiter = one if large else ordinary
    return await anyio.to_thread.run_sync(work, limiter=limiter)
