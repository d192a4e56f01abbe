"""Errors as HTTP answers: always `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from pydantic import ValidationError
from pydantic_core import from_json

from qvl.errors import (
    AuthError,
    BackendUnavailableError,
    ConfigError,
    MissingDependencyError,
    QvlError,
    RateLimitError,
    RequestError,
)
from qvl.server.answers import Error
from qvl.server.settings import MAX_RETRY_AFTER
from qvl.types import JsonMapping

CLIENT_CLOSED_REQUEST: Final = 499
MOST_ERRORS: Final = 100
_SENTENCES: Final = {
    "extra_forbidden": "unknown field",
    "missing": "is missing",
    "union_tag_not_found": "has no type",
    "json_invalid": "the body is not valid JSON",
}


class ClientGoneError(Exception):
    """The client closed its connection before its answer was sent."""


class HttpError(RequestError):
    """A request refused at the HTTP level: path, method, size, media type, time limit."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        hint: str | None = None,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message, hint=hint, param=param, code=code)
        self.http_status = status
        self.headers = headers


class InvalidKeyError(AuthError):
    """The client's key is missing or wrong (not the endpoint's)."""


class DeadlineError(QvlError):
    """The request took longer than its deadline."""

    retryable: ClassVar[bool] = True
    status: ClassVar[int] = 504
    default_code: ClassVar[str] = "deadline_exceeded"


class DrainingError(BackendUnavailableError):
    """The server is shutting down, or was shut down before the answer was complete."""

    default_code: ClassVar[str] = "server_shutting_down"


class InternalError(QvlError):
    """An unexpected error of the server; the message has only the request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__("internal error", hint=f"report the request id {request_id}")


def status_of(error: QvlError) -> int:
    """Return the HTTP status of `error`."""
    if isinstance(error, HttpError):
        return error.http_status
    if isinstance(error, MissingDependencyError):
        return 500
    # Where the upstream refuses the server's own key, the client can do nothing about it.
    if isinstance(error, AuthError) and not isinstance(error, InvalidKeyError):
        return 502
    return error.status


def error_of(error: QvlError) -> Error:
    """Return the JSON body of `error`."""
    status = status_of(error)
    kind = error.type
    code: str = error.code
    if status == 502 and isinstance(error, AuthError):
        kind, code = "server_error", "upstream_refused_credentials"
    elif isinstance(error, MissingDependencyError):
        kind = "server_error"  # the client has done nothing wrong
    elif isinstance(error, ConfigError) and status == 400 and code in ("invalid_config", "unknown_name"):
        code = "unsupported_parameter" if error.message.startswith("unknown parameter") else "invalid_value"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """The form of errors in an API: status, body (with the request's id), and the type of that body.

    `id_header` is where the API's clients look for the request's id, beside `x-request-id`.
    """

    status: Callable[[QvlError], int]
    body: Callable[[QvlError, str], Mapping[str, object]]
    answer: type
    id_header: bytes | None = None


OPENAI_ERRORS: Final = ErrorForm(status_of, lambda error, request_id: error_of(error), Error)


def headers_of(error: QvlError) -> list[tuple[bytes, bytes]]:
    """Return the headers of `error`: Retry-After, WWW-Authenticate, Allow and its own."""
    headers = list(error.headers) if isinstance(error, HttpError) else []
    if isinstance(error, InvalidKeyError):
        headers.append((b"www-authenticate", b"Bearer"))
    wait = getattr(error, "retry_after", None)
    if wait is None and isinstance(error, RateLimitError | BackendUnavailableError):
        wait = 1.0
    if wait is not None:
        # OpenAI's clients do not try again at all when they are told to wait longer than two minutes.
        wait = min(max(float(wait), 0.001), MAX_RETRY_AFTER)
        headers.append((b"retry-after", b"%d" % math.ceil(wait)))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(wait * 1000)))
    return headers


def from_validation(exc: ValidationError, request: bytes | JsonMapping) -> RequestError:
    """Return the deepest of pydantic's errors in the request, as one line with the field's path."""
    errors = exc.errors(include_url=False, include_input=False)[:MOST_ERRORS]
    if errors[0]["type"] == "json_invalid":
        return RequestError("the body is not valid JSON", hint=_one_line(errors[0]["msg"]), code="invalid_json")
    root = from_json(request) if isinstance(request, bytes) else request
    # Each member of a union has its say; the one that went furthest is the one that was meant, or that has the type.
    paths = [_path(error["loc"], root, missing=error["type"] == "missing") for error in errors]
    deepest = max(range(len(paths)), key=lambda number: (len(paths[number]), errors[number]["type"][-5:] != "_type"))
    error, steps = errors[deepest], paths[deepest]
    kind = error["type"]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)[:200].lstrip(".") or None
    fault, hint = _SENTENCES.get(kind) or _one_line(error["msg"]), None
    if kind == "union_tag_invalid":
        context = error["ctx"]
        param = f"{param or ''}.{str(context['discriminator']).strip(chr(39))}".lstrip(".")
        fault = f"unknown value {str(context['tag'])[:80]!r}"
        hint = f"known: {context['expected_tags']}".replace("'", "")
    code = "unsupported_parameter" if kind == "extra_forbidden" else "invalid_value"
    if kind == "missing":
        code = "missing_required_parameter"
    return RequestError(f"{param or 'the body'}: {fault}", hint=hint, param=param, code=code)


def _path(loc: tuple[int | str, ...], root: object, *, missing: bool) -> list[int | str]:
    """Return `loc` without the names of union members, so that each step is a key or index of the request."""
    steps: list[int | str] = []
    value = root
    for number, step in enumerate(loc):
        if isinstance(value, Mapping) and step in value:  # noqa: SIM114  # joined, their types would not be narrowed
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
        elif not (missing and number == len(loc) - 1):
            continue
        steps.append(step)
    return steps


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
