"""The entry point of every request: rate limits, API keys, the deadline, and the mapping of errors to answers."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from qvl.errors import QvlError
from qvl.log import logger
from qvl.media import fetch
from qvl.server.errors import ClientGoneError, HttpError, InternalError
from qvl.server.exchange import Exchange
from qvl.server.request_body import OF_MEDIA
from qvl.server.route_table import Operation, Table
from qvl.server.routes.messages import MESSAGE_ERRORS
from qvl.server.state import ServerCore

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logger("qvl.server")

_ONCE: Final = frozenset(
    {b"host", b"authorization", b"x-api-key", b"content-type", b"content-length", b"content-encoding"}
)
_QUIET: Final = frozenset({"/health", "/ready", "/metrics"})


class Gateway:
    """Request ids, keys, limits, errors, the log line, and the server's own operations, for every HTTP request."""

    def __init__(self, app: ASGIApp, core: ServerCore) -> None:
        self.app = app
        self.core = core
        self.table = Table()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root):
            path = path[len(root) :] or "/"
        exchange = Exchange(self.core, scope, receive, send, path)
        self.core.requests_under_way += 1
        fetch.counter.set(exchange.hold_fetched)
        try:
            if self.core.tracing is not None:
                operation = (self.table.at(path) or {}).get(exchange.method)
                if operation is not None and operation.works:
                    exchange.traced = self.core.tracing.begin(exchange, operation.path)
            await self._answer(exchange)
        except ClientGoneError:
            exchange.gone()
            self.core.metrics.aborted.inc()
        except QvlError as exc:
            self.core.note_error(exc)
            await exchange.fail(exc)
        except Exception:
            log.exception("internal error", request_id=exchange.request_id)
            await exchange.fail(InternalError(exchange.request_id))
        finally:
            self.core.leave()
            self.core.held_bytes -= exchange.memory
            if exchange.traced is not None:
                exchange.traced.end()
            self._note(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        methods = self.table.at(exchange.path)
        operation = None
        if methods is not None:
            exchange.errors = next(iter(methods.values())).errors
        # Anthropic's clients read errors of their own form alone, even of what there is not.
        if exchange.path.startswith("/v1/m") and _is_anthropics(exchange):
            exchange.errors = MESSAGE_ERRORS
        _refuse_doubled(exchange.scope["headers"])
        if methods is not None:
            operation = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if operation is None or not operation.open:
            exchange.tenant = self.core.keys.tenant(
                exchange.headers.get(b"authorization"), exchange.headers.get(b"x-api-key")
            )
        if methods is None and exchange.errors is MESSAGE_ERRORS:
            raise HttpError(404, "path not found", code="not_found")
        if methods is None:
            await self._pass_on(exchange)
        elif operation is None:
            allowed = ", ".join(sorted({*methods, *(["HEAD"] if "GET" in methods else ())}))
            raise HttpError(
                405,
                f"{exchange.method[:20]} is not allowed at this path",
                hint=f"allowed: {allowed}",
                code="method_not_allowed",
                headers=((b"allow", allowed.encode()),),
            )
        elif operation.works:
            await self._work(exchange, operation)
        else:
            await operation.handler(exchange)

    async def _work(self, exchange: Exchange, operation: Operation) -> None:
        core = self.core
        kind = exchange.media_type
        # Only JSON: a page elsewhere could send other types to a server on this machine without being asked first.
        pictures = operation.path == "/v1/analyze"
        if kind != b"application/json" and not (pictures and kind.startswith(OF_MEDIA)):
            raise HttpError(
                415,
                f"unsupported Content-Type: the body must be JSON{' or a picture or PDF' if pictures else ''}",
                hint="add the header Content-Type: application/json"
                + (", or image/png and the like" if pictures else ""),
                code="unsupported_media_type",
            )
        core.refuse_if_closed()
        if not core.admission.running:
            core.readiness.note_progress()
        async with core.key_limits.enter(exchange.tenant):
            exchange.extra_headers += core.key_limits.headers(exchange.tenant)
            await operation.handler(exchange)

    async def _pass_on(self, exchange: Exchange) -> None:
        """Pass the request to FastAPI: plugins' routes, /openapi.json, and 404 for other paths."""

        await self.app(exchange.scope, exchange.receive, exchange.send)

    def _note(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        methods = self.table.at(exchange.path)
        route = exchange.path if methods is None else next(iter(methods.values())).path
        # Paths that are not ours would let a stranger make as many series as he likes.
        self.core.metrics.on_http(route if methods is not None else "other", exchange.status)
        tell = log.debug if exchange.path in _QUIET else log.info
        tell(
            "request",
            request_id=exchange.request_id,
            method=exchange.method,
            path=exchange.path[:200],
            status=exchange.status,
            seconds=round(seconds, 4),
            **exchange.fields,
        )


def _is_anthropics(exchange: Exchange) -> bool:
    path = exchange.path
    return path.startswith("/v1/messages/") or (
        path.startswith("/v1/models") and b"anthropic-version" in exchange.headers
    )


def _refuse_doubled(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse duplicates of headers that a proxy in front might interpret differently."""
    names = [name for name, _ in headers if name in _ONCE]
    if len(set(names)) == len(names):
        return
    for name, count in Counter(names).items():
        if count > 1:
            raise HttpError(400, f"{count} {name.decode().title()} headers in a request, not one", code="invalid_http")
