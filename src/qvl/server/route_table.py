"""The table of all routes: handler, authentication and OpenAPI documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from pydantic import BaseModel

from qvl.server import answers, messages_answers
from qvl.server.batches import objects
from qvl.server.errors import OPENAI_ERRORS, ErrorForm
from qvl.server.messages_schemas import CountTokensRequest, MessagesRequest
from qvl.server.openai_decisions_3_57 import DecisionAnswers, DecisionRequest
from qvl.server.responses_schemas import ResponsesRequest
from qvl.server.routes import (
    analyze,
    batches,
    chat,
    completions,
    decisions,
    files,
    locate,
    messages,
    pages,
    responses,
    system,
    tokens,
)
from qvl.server.schemas import (
    AnalyzeRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LocateRequest,
    TokenizeRequest,
)
from qvl.server.systemone_0_2 import INVALID, SYSTEM_ONE_ERRORS, SystemOneAnswers, SystemOneRequest

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
    errors: ErrorForm = OPENAI_ERRORS


def _work(
    path: str,
    handler: Handler,
    summary: str,
    request: type[BaseModel],
    answer: type,
    *,
    events: bool = True,
    errors: ErrorForm = OPENAI_ERRORS,
    own: tuple[int, ...] = (),
) -> Operation:
    """Return an operation that needs the model; `own` are statuses of its API alone."""
    statuses = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504, *own)
    return Operation(
        "POST", path, handler, summary, request, answer, statuses, works=True, events=events, errors=errors
    )


_KEPT: Final = (400, 401, 404, 503)
_STORED: Final = (400, 401, 404, 409, 500)
_UPLOAD: Final = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)

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
        "/v1/responses/input_tokens",
        responses.input_tokens,
        "Count the tokens of input items",
        ResponsesRequest,
        answers.InputTokens,
        events=False,
    ),
    Operation(
        "GET", "/v1/responses/{id}", responses.retrieve, "A response that was kept", None, answers.Response, _KEPT
    ),
    Operation("DELETE", "/v1/responses/{id}", responses.delete, "Delete one", None, answers.DeletedResponse, _KEPT),
    Operation(
        "GET",
        "/v1/responses/{id}/input_items",
        responses.input_items,
        "What it answers",
        None,
        answers.InputItemList,
        _KEPT,
    ),
    Operation("POST", "/v1/responses/{id}/cancel", responses.cancel, documented=False),
    _work(
        "/v1/messages",
        messages.messages,
        "Answer a conversation, in Anthropic's form",
        MessagesRequest,
        messages_answers.AnsweredMessage,
        errors=messages.MESSAGE_ERRORS,
        own=(messages.OVERLOADED,),
    ),
    _work(
        "/v1/messages/count_tokens",
        messages.count_tokens,
        "Count the tokens of a conversation",
        CountTokensRequest,
        messages_answers.TokenCount,
        events=False,
        errors=messages.MESSAGE_ERRORS,
        own=(messages.OVERLOADED,),
    ),
    _work("/tokenize", tokens.tokenize, "Tokens of a prompt", TokenizeRequest, answers.TokenList, events=False),
    _work("/detokenize", tokens.detokenize, "Text of tokens", DetokenizeRequest, answers.DetokenizedText, events=False),
    _work(
        "/v1/analyze", analyze.analyze, "Analyze a product on pictures", AnalyzeRequest, answers.Analysis, events=False
    ),
    _work(
        "/v1/locate",
        locate.locate,
        "Locate things on a picture: boxes or points",
        LocateRequest,
        locate.LocatedObjects,
        events=False,
    ),
    _work(
        "/v1/decisions",
        decisions.decisions,
        "How probable each possible answer to a question is",
        DecisionRequest,
        DecisionAnswers,
        events=False,
    ),
    _work(
        "/v1/systemone",
        decisions.system_one,
        "The same, in System One's form",
        SystemOneRequest,
        SystemOneAnswers,
        events=False,
        errors=SYSTEM_ONE_ERRORS,
        own=(INVALID,),
    ),
    Operation("POST", "/v1/files", files.create_file, "Upload a file", None, objects.FileObject, _UPLOAD),
    Operation("GET", "/v1/files", files.list_files, "List the files", None, objects.FileList, _STORED),
    Operation("GET", "/v1/files/{file_id}", files.get_file, "One file", None, objects.FileObject, _STORED),
    Operation("DELETE", "/v1/files/{file_id}", files.delete_file, "Delete a file", None, objects.FileDeleted, _STORED),
    Operation("GET", "/v1/files/{file_id}/content", files.file_content, "What is in a file", None, None, _STORED),
    Operation(
        *("POST", "/v1/batches", batches.create_batch, "Begin a batch"),
        *(objects.BatchRequest, objects.BatchObject, _UPLOAD),
    ),
    Operation("GET", "/v1/batches", batches.list_batches, "List the batches", None, objects.BatchList, _STORED),
    Operation("GET", "/v1/batches/{batch_id}", batches.get_batch, "One batch", None, objects.BatchObject, _STORED),
    Operation(
        *("POST", "/v1/batches/{batch_id}/cancel", batches.cancel_batch, "Cancel a batch"),
        *(None, objects.BatchObject, _STORED),
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
    """Finds the operation for a method and a path. `{name}` stands for the rest of a path, up to what follows it."""

    def __init__(self, operations: tuple[Operation, ...] = OPERATIONS) -> None:
        self._exact: dict[str, dict[str, Operation]] = {}
        self._open: dict[tuple[str, str], dict[str, Operation]] = {}
        for operation in operations:
            prefix, brace, rest = operation.path.partition("{")
            if brace:
                ends = (prefix, rest.partition("}")[2])
                self._open.setdefault(ends, {})[operation.method] = operation
            else:
                self._exact.setdefault(operation.path, {})[operation.method] = operation
        # `/v1/responses/{id}/input_items` before `/v1/responses/{id}`.
        self._open = dict(sorted(self._open.items(), key=lambda item: -len(item[0][1])))

    def at(self, path: str) -> dict[str, Operation] | None:
        """Return the operations at `path` by method, or None for a path that the server does not have."""
        if path in self._exact:
            return self._exact[path]
        for (prefix, suffix), methods in self._open.items():
            if path.startswith(prefix) and path.endswith(suffix) and len(path) > len(prefix) + len(suffix):
                return methods
        return None


def questions() -> dict[str, Operation]:
    """Return the operations that a line of a batch may name, by path: all that need the model."""
    return {operation.path: operation for operation in OPERATIONS if operation.works and operation.method == "POST"}
