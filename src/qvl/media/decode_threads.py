"""Threads for CPU work on pictures, limited by the number of cores and the memory."""

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
    """Run CPU work in a thread and return its result; limiters keep many uploads from taking every thread.

    Each event loop has one limiter for large pictures and another for the rest, which do not wait for large ones.
    """
    try:
        ordinary, one = _limiters.get()
    except LookupError:
        ordinary, one = anyio.CapacityLimiter(max(2, os.cpu_count() or 2)), anyio.CapacityLimiter(1)
        _limiters.set((ordinary, one))
    limiter = one if large else ordinary
    return await anyio.to_thread.run_sync(work, limiter=limiter)
