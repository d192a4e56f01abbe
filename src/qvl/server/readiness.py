"""Readiness of the server: loading, a failed canary, a dead or a stalled engine."""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qvl.errors import BackendTimeoutError, BackendUnavailableError, EngineDeadError, QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline

CANARY_SECONDS: Final = 120.0
# Between two looks whether an engine that was not there at the start has come.
FIRST_LOOK: Final = 1.0
LONGEST_LOOK: Final = 10.0
# Between two looks whether the backend is lost for this process.
WATCH_SECONDS: Final = 1.0
log = logger("qvl.server")


class Readiness:
    """Opens the pipeline, sends a canary request with a tiny picture, and then watches for a dead or stalled engine."""

    def __init__(self, pipeline: AsyncPipeline, *, canary: bool, stall_timeout: float) -> None:
        self.pipeline = pipeline
        self.failure: QvlError | None = None
        # Tells whoever runs the server; without it, the log does.
        self.on_failure: Callable[[QvlError], None] | None = None
        self.on_death: Callable[[str], None] = lambda reason: None
        self._canary = canary
        self._canary_failure: str | None = None
        self._stall_timeout = stall_timeout
        self._opened = False
        self._task: asyncio.Task[None] | None = None
        self._dead: str | None = None
        self._progress = time.monotonic()
        self._running: Callable[[], int] = lambda: 0
        # Tells whoever runs the server that it waits for engines that are not there.
        self.on_absence: Callable[[QvlError], None] = lambda error: None
        self._absence: QvlError | None = None
        # True for the successor of a process that ended: the same settings were right before, so whatever keeps the
        # backend from opening now (a host that is not back yet) is an absence too.
        self.replaces = False
        self.settled = asyncio.Event()
        # Set as soon as requests get an answer, be it that no engine is there yet.
        self.told = asyncio.Event()

    def start(self, running: Callable[[], int]) -> None:
        """Start loading in the background, unless started already; `running` returns the number of requests."""
        if self._task is None:
            self._running = running
            self._task = asyncio.get_running_loop().create_task(self._open_and_watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _open_and_watch(self) -> None:
        await self._open()
        while self.failure is None and self._dead is None:
            if (reason := self.pipeline.backend.lost()) is not None:
                self.note_death(reason)
            await asyncio.sleep(WATCH_SECONDS)

    async def _open(self) -> None:
        try:
            await self._open_when_there()
            self._opened = True
            if self._canary:
                await self._ask_canary()
        except QvlError as exc:
            self.failure = exc
            if self.on_failure is None:
                log.error("the model cannot be opened", error=str(exc))
            else:
                self.on_failure(exc)
        except Exception as exc:
            self.failure = BackendUnavailableError(f"the model cannot be opened: {type(exc).__name__}")
            log.exception("the model cannot be opened")
            if self.on_failure is not None:
                self.on_failure(self.failure)
        finally:
            self.settled.set()
            self.told.set()

    async def _open_when_there(self) -> None:
        """Open the pipeline; wait for engines elsewhere that are not there yet, which may start after this server."""
        pause = FIRST_LOOK
        while True:
            try:
                await self.pipeline.open()
                break
            except QvlError as exc:
                unavailable = isinstance(exc, BackendUnavailableError | BackendTimeoutError)
                if not self.pipeline.backend.engines_may_come or not (unavailable or self.replaces):
                    raise
                if self._absence is None:
                    log.warning("no engine answers yet", error=str(exc))
                    self.on_absence(exc)
                self._absence = exc
            self.told.set()
            await asyncio.sleep(pause)
            pause = min(pause * 2.0, LONGEST_LOOK)
        if self._absence is not None:
            self._absence = None
            log.info("an engine answers")

    async def _ask_canary(self) -> None:
        """Generate one token about a tiny picture, to test the path from pixels to text before the server is ready."""
        content: list[dict[str, object]] = [{"type": "text", "text": "What is this?"}]
        if self.pipeline.backend.capabilities.images:
            content.insert(0, {"type": "image", "image": tiny_png()})
        try:
            asking = self.pipeline.chat([{"role": "user", "content": content}], cache="off", max_tokens=1)
            await asyncio.wait_for(asking, CANARY_SECONDS)
        except (TimeoutError, QvlError) as exc:
            self._canary_failure = f"the canary request failed: {exc or 'no answer in time'}"
            log.error("canary failed", error=self._canary_failure)

    def note_progress(self) -> None:
        """Record that a token was generated, or that a request started after an idle time."""
        self._progress = time.monotonic()

    def note_success(self) -> None:
        self._canary_failure = None

    def note_error(self, error: QvlError) -> None:
        """Record an EngineDeadError of a request: the server is not ready from then on; other errors are ignored."""
        if isinstance(error, EngineDeadError):
            self.note_death(str(error))

    def note_death(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
            log.error("the engine is dead", reason=reason)
            self.on_death(reason)

    @property
    def dead(self) -> bool:
        return self._dead is not None

    def closed(self) -> QvlError | None:
        """Return the error that every request gets (still loading, loading failed, engine dead); else None."""
        if self.failure is not None:
            return self.failure
        if self._dead is not None:
            return EngineDeadError(self._dead, hint="the server must be restarted")
        if self._absence is not None:
            return BackendUnavailableError(f"no engine answers yet: {self._absence.message}", hint="try again later")
        if not self._opened:
            return BackendUnavailableError("the model is being loaded", hint="try again in a while")
        return None

    def reason(self) -> str | None:
        """Return why the server is not ready, or None when it is."""
        closed = self.closed()
        if closed is not None:
            return closed.message
        if not self.settled.is_set():
            return "the canary request is running"
        unready = self.pipeline.backend.unready()
        if unready is not None:
            return unready
        if self._running() and time.monotonic() - self._progress > self._stall_timeout:
            return f"stalled: no token for {self._stall_timeout:g} s while requests run"
        return self._canary_failure


def tiny_png() -> bytes:
    """Return the PNG bytes of a grey picture of 64 x 64 pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\x00" + b"\x80\x80\x80" * 64) * 64
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", zlib.compress(rows)) + block(b"IEND", b"")
