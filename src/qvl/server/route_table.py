"""The table of all routes: handler, authentication and OpenAPI documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from pydantic import BaseModel

from qvl.server import answers
from qvl.server.routes import analyze, chat, completions, pages, responses, system
from qvl.server.schemas import AnalyzeRequest, ChatCompletionRequest, CompletionRequest, ResponsesRequest

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange

Handler: TypeAlias = "Callable[[Exchange], Awaitable[None]]"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method at one path. `works` is True if it needs the model, and is refused while the model is not ready."""

    method: str
    path: str
    handler: Handler
    summary: str = ""
    request: type[BaseModel] | None = None
    answer: type | None = None
    statuses: tuple[int, ...] = ()
    open: bool = False
    works: bool = False
    events: bool = False
    documented: bool = True


def _work(
    path: str, handler: Handler, summary: str, request: type[BaseModel], answer: type, *, events: bool = True
) -> Operation:
    """Return an operation that needs the model."""
    statuses = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)
    return Operation("POST", path, handler, summary, request, answer, statuses, works=True, events=events)


OPERATIONS: Final = (
    _work(
        "/v1/chat/completions",
        chat.chat_completions,
        "Answer a conversation with pictures",
        ChatCompletionRequest,
        answers.ChatCompletion,
    ),
    _work("/v1/completions", completions.completions, "Complete a prompt", CompletionRequest, answers.Completion),
    _work("/v1/responses", responses.responses, "Answer input items", ResponsesRequest, answers.Response),
    _work(
        "/v1/analyze", analyze.analyze, "Analyze a product on pictures", AnalyzeRequest, answers.Analysis, events=False
    ),
    Operation("GET", "/v1/models", system.models, "List the models", None, answers.ModelList, (401, 429)),
    Operation("GET", "/v1/models/{model}", system.model, "One model", None, answers.Model, (400, 401, 404, 429)),
    Operation("GET", "/health", system.health, "Liveness", None, answers.Health, open=True),
    Operation("GET", "/ready", system.ready, "Readiness", None, answers.Ready, (401, 503)),
    Operation("GET", "/metrics", system.metrics, "Prometheus metrics", None, None, (401,)),
    Operation("GET", "/version", system.version, "Version, backend and models", None, answers.Version, (401,)),
    Operation("GET", "/", pages.page, open=True, documented=False),
    Operation("GET", "/docs", pages.page, open=True, documented=False),
    Operation("GET", "/static/{name}", pages.page, open=True, documented=False),
    Operation("GET", "/favicon.ico", pages.nothing, open=True, documented=False),
)


class Table:
    """Finds the operation for a method and a path."""

    def __init__(self, operations: tuple[Operation, ...] = OPERATIONS) -> None:
        self._exact: dict[str, dict[str, Operation]] = {}
        self._prefixed: list[tuple[str, dict[str, Operation]]] = []
        for operation in operations:
            prefix, brace, _ = operation.path.partition("{")
            if brace:
                self._prefixed.append((prefix, {operation.method: operation}))
            else:
                self._exact.setdefault(operation.path, {})[operation.method] = operation

    def at(self, path: str) -> dict[str, Operation] | None:
        """Return the operations at `path` by method, or None for a path that the server does not have."""
        if path in self._exact:
            return self._exact[path]
        for prefix, methods in self._prefixed:
            if path.startswith(prefix) and len(path) > len(prefix):
                return methods
        return None
