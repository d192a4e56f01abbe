"""The application: a plain ASGI gateway in front of FastAPI, which has the routes of plugins and mounted apps."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from qvl._version import __version__
from qvl.errors import ConfigError, QvlError
from qvl.log import logger
from qvl.server import tracing
from qvl.server.answers import dumps
from qvl.server.batches.runner import BatchRunner
from qvl.server.batches.store import BatchStore
from qvl.server.errors import HttpError, error_of, headers_of, status_of
from qvl.server.gateway import Gateway
from qvl.server.openapi import document
from qvl.server.route_table import questions
from qvl.server.settings import ServerSettings
from qvl.server.state import ServerCore

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

    from qvl.pipeline.async_pipeline import AsyncPipeline

log = logger("qvl.server")


def create_app(
    pipeline: AsyncPipeline, settings: ServerSettings | None = None, *, tracer_provider: TracerProvider | None = None
) -> FastAPI:
    """Return the server as an ASGI application, to run or to mount.

    The application takes ownership of the pipeline: it is opened in the background when the application starts
    (or with the first request, where a mount hides the start), and closed with it. `app.state.core` is the
    `ServerCore`. Requests are traced by `tracer_provider`, or by the process's own where OpenTelemetry was set up
    before the application starts.

    Raises:
        ConfigError: the key file cannot be read, or requests could name files of this machine.
    """
    settings = settings or ServerSettings()
    if settings.media.allow_files:
        raise ConfigError("a server's media policy must not allow files", hint="MediaPolicy(allow_files=False)")
    core = ServerCore(pipeline, settings)
    core.tracing = tracing.active_tracing(tracer_provider)
    if core.executor.store is not None and core.settings.hot_seconds:
        core.executor.store.keep_hot(core.settings.hot_seconds)

    runner = _batches(core)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        core.tracing = core.tracing or tracing.active_tracing()
        core.start()
        core.wake_batches()
        yield
        if runner is not None:
            await runner.stop()
        await core.aclose()

    app = Application(core, lifespan)
    app.state.core = core
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(QvlError, _qvl_error)
    app.add_api_route("/openapi.json", _openapi, include_in_schema=False)
    if core.settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(core.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-qvl-cache", "cache-status", "age", "retry-after", "server-timing"],
        )
    core.executor.plugins.hook.register_routes(app=app, pipeline=pipeline)
    return app


def _batches(core: ServerCore) -> BatchRunner | None:
    """Give `core` its folder of batches; return what runs them, None for a server that has none."""
    settings = core.settings
    if settings.batch_dir is None:
        return None
    lane = hashlib.sha256("\n".join(sorted(core.names)).encode()).hexdigest()[:12]
    store = BatchStore(
        settings.batch_dir, lane, max_bytes=settings.batch_disk_bytes, max_file_bytes=settings.max_batch_file_bytes
    )
    routes = questions()
    runner = BatchRunner(core, store, routes)
    core.batch_store, core.batch_endpoints, core.wake_batches = store, frozenset(routes), runner.wake
    return runner


class Application(FastAPI):
    """FastAPI behind the gateway, which answers the server's own operations before FastAPI looks at a request."""

    def __init__(self, core: ServerCore, lifespan: Lifespan[FastAPI]) -> None:
        super().__init__(
            title="qvl", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
        )
        self._core = core

    def build_middleware_stack(self) -> ASGIApp:
        """Return the gateway, inside any middleware that others add (CORS, a mounter's own)."""
        if not self.user_middleware:
            return Gateway(super().build_middleware_stack(), self._core)
        self.user_middleware.append(Middleware(Gateway, core=self._core))
        try:
            return super().build_middleware_stack()
        finally:
            self.user_middleware.pop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        # As Starlette does it. FastAPI's own way looks for telemetry in the environment at every request.
        scope["app"] = self
        if self.root_path:
            scope["root_path"] = self.root_path
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)


async def _http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    words = {404: ("path not found", "not_found"), 405: ("method not allowed", "method_not_allowed")}
    message, code = words.get(exc.status_code, (str(exc.detail), "http_error"))
    headers = tuple((k.lower().encode(), v.encode()) for k, v in (exc.headers or {}).items())
    return _error_response(HttpError(exc.status_code, message, code=code, headers=headers))


async def _validation_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    param = ".".join(str(part) for part in first["loc"])
    return _error_response(HttpError(422, f"{param}: {first['msg']}", param=param, code="invalid_value"))


async def _qvl_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, QvlError)
    return _error_response(exc)


def _error_response(error: QvlError) -> Response:
    headers = {name.decode(): value.decode() for name, value in headers_of(error)}
    return Response(dumps(error_of(error)), status_of(error), headers, "application/json")


async def _openapi(request: Request) -> Response:
    return Response(dumps(request.app.openapi()), media_type="application/json")
