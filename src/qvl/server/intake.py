"""Reads what a connection receives: heads and small bodies through the HTTP parser, large bodies past it.

Through the parser every piece of a body is copied four times and wakes whoever waits for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import weakref
from typing import TYPE_CHECKING, Final

import httptools

from qvl.errors import QvlError
from qvl.server.errors import ClientGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SCRATCH: Final = 64 * 1024
# New bytes that are not cleared: what is not received takes no memory, and what is received is written once.
_unset = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def _drop(size: int) -> None:
    """Do nothing about bytes that nobody reads."""


def _missing(cycle: RequestResponseCycle) -> int:
    """Return how many bytes of a body are still to come; 0 if its length is not known."""
    announced = next((value for name, value in cycle.scope["headers"] if name == b"content-length"), b"")
    return int(announced or len(cycle.body)) - len(cycle.body)


class CycleBody:
    """The body of the request of one `cycle`, for a `BodyReader`."""

    __slots__ = ("_cycle", "_intake")

    def __init__(self, intake: Intake, cycle: RequestResponseCycle) -> None:
        self._intake = intake
        # It has the scope, and with it a reference to this.
        self._cycle = weakref.proxy(cycle)

    def whole(self) -> bytes | None:
        """Return the body if all of it has come; None, taking nothing, if it has not."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        cycle.message_event.clear()
        return body

    async def read(self, length: int, came: Callable[[int], None], due: Callable[[], float]) -> bytes:
        """Return the body as it comes; see `Intake.read_body`."""
        return await self._intake.read_body(self._cycle, length, came, due)


class Intake(asyncio.BufferedProtocol):
    """The protocol of a connection, in front of uvicorn's `http`. `scratch` is shared by all of one event loop."""

    def __init__(self, http: HttpToolsProtocol, scratch: bytearray) -> None:
        self._http = http
        self._handler: asyncio.Protocol = http
        self._scratch = memoryview(scratch)
        # Bytes of the body that do not go through the parser; without a reader they are dropped.
        self._missing = 0
        self._body = io.BytesIO()
        self._room = memoryview(b"")
        self._at = 0
        self._came: Callable[[int], None] = _drop
        self._whole: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def read_body(
        self, cycle: RequestResponseCycle, length: int, came: Callable[[int], None], due: Callable[[], float]
    ) -> bytes:
        """Return the body, of `length` bytes, of the request of `cycle`; `came(size)` is called for each piece.

        Raises:
            ClientGoneError: the client went away before the end.
            TimeoutError: it has not come by the loop's time `due()`, which is later the more came.
            QvlError: what `came` raised.
        """
        if cycle.disconnected:
            raise ClientGoneError
        if cycle.waiting_for_100_continue:
            self._http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        begun, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        came(len(begun))
        if not cycle.more_body:
            return bytes(begun)
        self._missing, self._at = length - len(begun), len(begun)
        self._came, self._whole = came, asyncio.get_running_loop().create_future()
        self._body = io.BytesIO(_unset(None, length))
        self._room = self._body.getbuffer()
        self._room[: self._at] = begun
        self._http.flow.resume_reading()
        self._end_at(due, self._whole)
        try:
            await self._whole
            # With no view of it left, the body is handed over and not copied.
            self._room.release()
            return self._body.getvalue()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._whole, self._body, self._room = None, io.BytesIO(), memoryview(b"")
            # They have the request, and with it the body, which would stay as long as the connection idles.
            self._came, self._timer = _drop, None

    def _end_at(self, due: Callable[[], float], whole: asyncio.Future[None]) -> None:
        """Let the reading end with TimeoutError at the loop's time `due()`, which is asked again when it has come."""
        loop = whole.get_loop()
        if (at := due()) > loop.time():
            # Set anew for each piece, a timer would take longer than the piece.
            self._timer = loop.call_at(at, self._end_at, due, whole)
        elif not whole.done():
            whole.set_exception(TimeoutError())

    def get_buffer(self, sizehint: int) -> memoryview:
        if not self._missing:
            return self._scratch
        if self._whole is None or self._whole.done():
            return self._scratch[: self._missing]
        return self._room[self._at :]

    def buffer_updated(self, nbytes: int) -> None:
        if not self._missing:
            http, before = self._http, self._http.cycle
            http.data_received(self._scratch[:nbytes])  # type: ignore[arg-type]  # it reads any buffer
            if http.cycle is not before and http.cycle.more_body and _missing(http.cycle) > SCRATCH:
                # Its reader makes room for it first.
                http.flow.pause_reading()
            return
        self._missing -= nbytes
        whole = self._whole
        if whole is not None and not whole.done():
            self._at += nbytes
            try:
                self._came(nbytes)
            except QvlError as exc:
                whole.set_exception(exc)
        if not self._missing:
            self._end_body()

    def _end_body(self) -> None:
        """Have the parser expect another request, and tell whoever reads this one."""
        http = self._http
        http.parser = httptools.HttpRequestParser(http)
        http.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        http.cycle.more_body = False
        if self._whole is None or self._whole.done():
            http.cycle.message_event.set()
        else:
            self._whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(ClientGoneError())
        self._http.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()
