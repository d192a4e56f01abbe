"""Keeps requests for the logprobs of named tokens apart from those for the likeliest tokens' ones.

A step of vLLM 0.32 that has both kinds tells the second kind nothing but the sampled tokens (`v1/sample/sampler.py`:
where both are asked for, it takes the named ones for the whole batch). So the kinds run in turns, first come, first
served; requests without logprobs run at any time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["named", "likeliest"]


class LogprobTurns:
    """Lets any number of requests of one kind run at a time."""

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._running = 0
        self._waiting: deque[tuple[Kind, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def turn(self, kind: Kind | None) -> AsyncGenerator[None, None]:
        """Wait until no request of the other kind runs or waits ahead; `kind` None does not wait."""
        if kind is None:
            yield
            return
        await self._enter(kind)
        try:
            yield
        finally:
            self._running -= 1
            self._admit()

    async def _enter(self, kind: Kind) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Let in and cancelled at once.
                self._running -= 1
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            kind, turn = self._waiting[0]
            if not turn.cancelled():
                if self._running and kind != self._kind:
                    return
                self._kind = kind
                self._running += 1
                turn.set_result(None)
            self._waiting.popleft()
