"""Running the application under uvicorn: time limits for slow clients, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import uvicorn

from qvl.errors import ConfigError, EngineDeadError, QvlError, RequestError
from qvl.log import logger
from qvl.server.answers import dumps
from qvl.server.errors import error_of
from qvl.server.request_body import READ_BODY

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _Protocol

    from qvl.server.intake import SCRATCH, CycleBody, Intake
except ImportError:  # httptools has no wheel for every platform
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol  # type: ignore[assignment]

    SCRATCH = 0  # type: ignore[misc]

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qvl.server.state import ServerCore

# Clients that keep their connection are told within this time that it ends, instead of finding it closed.
FAREWELL_SECONDS: Final = 0.5
# What closes after the last answer (the backend, connections, threads) has this long.
EXIT_SECONDS: Final = 3.0
SETTLE_SECONDS: Final = 20.0
log = logger("qvl.server")


class CorkedTransport:
    """A transport that buffers writes per event loop iteration, so that headers and body leave in one packet."""

    __slots__ = ("_loop", "_pieces", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._pieces.clear()
        self._transport.abort()

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._transport.write(b"".join(pieces))


class UnknownLength(int):
    """The Content-Length counter of a body that ends with the connection: every comparison and count succeeds."""

    def __lt__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    def __sub__(self, other: int) -> UnknownLength:
        return self

    __hash__ = int.__hash__


class GuardedProtocol(_Protocol):
    """uvicorn's HTTP protocol with a timeout for headers, and JSON errors for invalid ones.

    Further differences: HTTP/1.1 requires a Host header; answers without a length close the connection of HTTP/1.0
    clients, which do not know chunked encoding; a client that has closed its sending side is answered.
    """

    header_timeout = 10.0
    probe_seconds = 1.0
    scratch = bytearray(SCRATCH)
    _intake: Intake | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _refusal = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(CorkedTransport(transport, self.loop))  # type: ignore[arg-type]
        if self.scratch:
            self._intake = Intake(self, self.scratch)
            transport.set_protocol(self._intake)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() == "1.1" and all(name != b"host" for name, _ in self.headers):
            self._refusal = "missing Host header"
            raise ValueError(self._refusal)
        super().on_headers_complete()
        if self._intake is not None:
            self.scope["extensions"] = {READ_BODY: {"reader": CycleBody(self._intake, self.cycle)}}
        if self.scope["http_version"] == "1.0":
            self.cycle.waiting_for_100_continue = False
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = UnknownLength()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        cycle = self.cycle
        if self.scheme == "https" or cycle is None or cycle.response_complete or cycle.more_body:
            # Closed by us, what is corked is written first.
            self.transport.close()
            return None
        # It may have closed its sending side alone. Whoever is gone answers what is sent with a reset.
        cycle.keep_alive = False
        if self.scope["http_version"] != "1.0":
            self._probe_timer = self.loop.call_later(self.probe_seconds, self._probe)
        return True

    def _probe(self) -> None:
        if not self.cycle.response_started and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probe_timer = self.loop.call_later(self.probe_seconds, self._probe)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._arm()
        else:
            self._disarm()

    def _arm(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout, self._too_slow)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.write(_head_error(408, "Request Timeout", "the headers were too slow", "request_timeout"))
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        message = self._refusal or "invalid HTTP request"
        self.transport.write(_head_error(400, "Bad Request", message, "invalid_http"))
        self.transport.close()


def _head_error(status: int, phrase: str, message: str, code: str) -> bytes:
    body = dumps(error_of(RequestError(message, code=code)))
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class GracefulServer(uvicorn.Server):
    """A uvicorn server that drains on SIGTERM or SIGINT and exits with 0; a second signal ends the process at once.

    SIGINT before the model is loaded exits with 130, like any interrupted program.
    """

    def __init__(self, config: uvicorn.Config, core: ServerCore) -> None:
        super().__init__(config)
        self.core = core
        self.failure: QvlError | None = None
        self.interrupted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reload_at_start = False
        self._draining: asyncio.Task[None] | None = None
        self.when_settled: Callable[[], None] = lambda: None
        # True to accept connections only when requests get an answer; those that come earlier wait at the port, for
        # SETTLE_SECONDS at most.
        self.settle_first = False
        core.readiness.on_failure = self.fail
        self._settling: asyncio.Task[None] | None = None

    def exit_on_death(self) -> None:
        """Let a dead engine end the server, so that its supervisor can restart it."""
        self.core.readiness.on_death = lambda reason: self.fail(EngineDeadError(reason))

    def fail(self, error: QvlError) -> None:
        """End the server; `run_server` raises `error`."""
        self.failure = error
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self.settle_first:
            self.core.start()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.core.readiness.told.wait(), SETTLE_SECONDS)
        if self.core.worker_metrics is not None:
            await self.core.worker_metrics.start()
        await super().startup(sockets)
        if self._reload_at_start:
            self.core.reload()
        self._settling = self._loop.create_task(self._announce_when_settled())

    async def _announce_when_settled(self) -> None:
        await self.core.readiness.settled.wait()
        if self.failure is None:
            self.when_settled()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        try:
            before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
            if hasattr(signal, "SIGHUP"):
                before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: self._hung_up())
        except ValueError:  # not the main thread: whoever owns it decides about signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.core.draining or self._loop is None:
            os._exit(128 + number)
        self.core.draining = True
        self.interrupted = number == signal.SIGINT and not self.core.readiness.settled.is_set()
        self._loop.call_soon_threadsafe(self.begin_drain)
        # A thread of its own: what hangs may be the loop, a worker, or the wait for one when the interpreter ends.
        threading.Thread(target=self._end_whatever_hangs, name="qvl-exit", daemon=True).start()

    def _end_whatever_hangs(self) -> None:
        time.sleep(self.core.settings.drain_timeout + EXIT_SECONDS)
        log.warning("forced shutdown", after_s=self.core.settings.drain_timeout + EXIT_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(130 if self.interrupted else 1)

    def _hung_up(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.core.reload)
        else:
            self._reload_at_start = True

    def begin_drain(self) -> None:
        """Start draining. Must be called on the server's event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining", under_way=self.core.requests_under_way)
        busy = bool(self.server_state.connections)
        if not await self.core.drain():
            log.warning("requests were aborted by the shutdown", count=self.core.requests_under_way)
        if busy:
            await asyncio.sleep(FAREWELL_SECONDS)
        self.should_exit = True


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a listening socket; `shared`: further ones of this user may listen at the same port (SO_REUSEPORT).

    Raises:
        ConfigError: the port is in use, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {host!r}: {exc.strerror or exc}", hint="--host 127.0.0.1") from exc
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {(exc.strerror or str(exc)).lower()}",
            hint="choose another --port, or stop the program that listens there",
            param="port",
        ) from exc
    return listener


def make_server(
    app: FastAPI,
    *,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    root_path: str = "",
    header_timeout: float = 10.0,
) -> GracefulServer:
    """Return a server for an application made by `create_app`; `header_timeout` is in seconds.

    Raises:
        ConfigError: certificate and key cannot be read, or do not belong together.
    """
    if tls_cert or tls_key:
        _check_tls(tls_cert, tls_key)
    # Its own, since other servers of this process may run in other threads.
    fields = {"header_timeout": header_timeout, "scratch": bytearray(SCRATCH)}
    protocol = type("Protocol", (GuardedProtocol,), fields)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        root_path=root_path,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return GracefulServer(config, app.state.core)


def _check_tls(cert: str | None, key: str | None) -> None:
    if cert is None:
        raise ConfigError("TLS key given without a certificate", hint="--tls-cert FILE", param="tls_cert")
    try:
        # The password keeps OpenSSL from asking for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except OSError as exc:
        if exc.filename or not isinstance(exc, ssl.SSLError):
            missing = " or ".join(name for name in (cert, key) if name and not os.access(name, os.R_OK))
            reason = f"{missing} cannot be read: {(exc.strerror or str(exc)).lower()}"
        else:
            if "ENCRYPTED" in Path(key or cert).read_text("latin-1"):
                reason = "the key has a password"
            elif exc.reason == "KEY_VALUES_MISMATCH":
                reason = "the key does not match the certificate"
            else:
                reason = "no PEM certificate or key found in one of them"
            reason = f"{cert} and {key or 'the key in it'}: {reason}"
        raise ConfigError(
            f"TLS cannot be set up: {reason}", hint="two PEM files, the key without a password", param="tls_cert"
        ) from exc


def _spare_what_stays() -> None:
    """Exclude all existing objects (modules, weights) from garbage collection.

    A full collection would stall every request for tens of milliseconds, and these objects live until the end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def run_server(server: GracefulServer, listener: socket.socket) -> None:
    """Serve until a signal or an error ends the server.

    Raises:
        QvlError: the model could not be opened, or the engine died after `exit_on_death`.
    """
    announce = server.when_settled

    def settled() -> None:
        _spare_what_stays()
        announce()

    server.when_settled = settled
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        listener.close()
    if server.interrupted:
        sys.exit(130)
    if server.failure is not None:
        raise server.failure
