"""Translates failures of endpoints into qvl's errors.

Servers differ in error bodies: OpenAI's `{"error": {…}}`, vLLM's with an int code or `{"error": "text"}`, SGLang's and
LMDeploy's flat `{"object": "error", …}`, FastAPI's `{"detail": …}`, plain text, and a proxy's HTML. The text is kept,
shortened. Only `crossing` translates exceptions of the openai package.
"""

from __future__ import annotations

import enum
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Final, NoReturn

from qvl.backends.openai.retry import LONGEST_RETRY_AFTER, read_retry_after
from qvl.errors import (
    AuthError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    BackendUnavailableError,
    ContextLengthError,
    DeviceMemoryError,
    EngineDeadError,
    MediaError,
    MissingDependencyError,
    QvlError,
    RateLimitError,
    RequestError,
    UnknownNameError,
    UnsupportedInputError,
)
from qvl.http.sse import shorten
from qvl.suggest import install_line

_CONTEXT: Final = re.compile(
    r"context[ _](length|window|size)|max_model_len|max(imum)? (input|sequence) length|prompt is too long"
    r"|longer than the (maximum )?model|too many (input )?tokens",
    re.I,
)
_UNSUPPORTED: Final = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown (parameter|argument|field)"
    r"|extra (inputs|fields)|extra_forbidden|unexpected fields|not permitted",
    re.I,
)
_PICTURE: Final = re.compile(r"(invalid|decode|load|fetch|corrupt|truncated).{0,40}(image|picture)", re.I)
_MEMORY: Final = re.compile(r"out of memory|OutOfMemory|NPU OOM|\bOOM\b")
_DEAD: Final = re.compile(r"EngineCore encountered an issue|EngineDead|engine (?:is|was) dead", re.IGNORECASE)
TOO_LARGE: Final = "request_too_large"
# The way out of a body that is too large.
FEWER: Final = "fewer or smaller pictures: max_pixels; of a video fewer frames: nframes"
_TAG: Final = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]{0,2000}>", re.S | re.I)


class Repeat(enum.Enum):
    """The endpoints to which a failed request may be sent again, if no chunk was delivered."""

    ANYWHERE = "anywhere"
    ELSEWHERE = "elsewhere"
    NEVER = "never"


class Impact(enum.Enum):
    """The effect of a failure on its endpoint's health: none, busy, a fault, down."""

    NONE = "none"
    BUSY = "busy"
    FAULT = "fault"
    DOWN = "down"


@dataclass(eq=False)
class Failed(Exception):
    """The failure of one attempt at one endpoint. Internal to the backend: callers get `error`.

    `untouched`: the endpoint certainly did no work, so that even a request with side effects may be repeated.
    `broke`: the connection ended while the endpoint was at work, as when its engine dies.
    """

    error: QvlError
    repeat: Repeat
    impact: Impact
    retry_after: float | None = None
    untouched: bool = False
    broke: bool = False

    def __str__(self) -> str:
        return str(self.error)

    def surface(self) -> NoReturn:
        """Raise `error` from what caused this."""
        error = self.error
        try:
            raise error from self.__cause__
        finally:
            # Else each refers to the other, and a collector's whole round keeps the request with its pictures alive.
            error.__context__ = None
            del self, error


def broken(message: str, where: str, *, hint: str | None = None) -> Failed:
    """Return the failure of an endpoint that sent an invalid answer."""
    return Failed(BackendResponseError(f"{where}: {message}", hint=hint), Repeat.ELSEWHERE, Impact.FAULT)


def cut_off(message: str, where: str) -> Failed:
    """Return the failure of a connection that ended before the answer did."""
    return Failed(BackendResponseError(f"{where}: {message}"), Repeat.ANYWHERE, Impact.FAULT, broke=True)


def down(message: str, where: str, *, hint: str | None = None, untouched: bool = True) -> Failed:
    error = BackendUnavailableError(f"{where}: {message}", hint=hint)
    return Failed(error, Repeat.ANYWHERE, Impact.DOWN, untouched=untouched, broke=not untouched)


def names_dead_engine(failed: Failed) -> bool:
    """Return True if the endpoint itself says that its engine died, as vLLM and qvl-serve do before they end."""
    return failed.error.code == EngineDeadError.default_code or bool(_DEAD.search(failed.error.message))


def too_slow(message: str, where: str, *, hint: str | None = None) -> Failed:
    return Failed(BackendTimeoutError(f"{where}: {message}", hint=hint), Repeat.ELSEWHERE, Impact.FAULT)


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The fields of an error body, whatever its shape."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None
    status: int | None = None


def read_error_body(body: object) -> ErrorBody:
    """Return the fields of an error body, which is a parsed JSON value or text."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        try:
            parsed = json.loads(body)
        except ValueError:
            return ErrorBody(shorten(_TAG.sub(" ", body) if "<" in body else body))
        if not isinstance(parsed, Mapping | list | str):
            return ErrorBody(shorten(body))
        body = parsed
    if isinstance(body, Mapping):
        return _from_mapping(body)
    return ErrorBody("" if body is None else shorten(body if isinstance(body, str) else _dump(body)))


def _from_mapping(body: Mapping[str, object]) -> ErrorBody:
    inner = body.get("error") or body
    if isinstance(inner, str):
        detail = body.get("message") or body.get("detail")
        return ErrorBody(shorten(f"{inner}: {detail}" if isinstance(detail, str) else inner))
    if not isinstance(inner, Mapping):
        return ErrorBody(shorten(_dump(body)))
    message = inner.get("message") or inner.get("detail") or inner.get("msg")
    if isinstance(message, list):
        # FastAPI's validation errors: the field at fault is in `loc`.
        first = message[0] if message and isinstance(message[0], Mapping) else {}
        loc = [str(part) for part in first.get("loc") or () if part != "body"]
        text = f"{'.'.join(loc)}: {first.get('msg')}" if loc and first.get("msg") else _dump(message)
        return ErrorBody(shorten(text), type=_text(first.get("type")), param=loc[0] if loc else None)
    code = inner.get("code")
    status = code if isinstance(code, int) and 100 <= code < 600 else None
    return ErrorBody(
        shorten(message if isinstance(message, str) and message else _dump(message or inner)),
        type=_text(inner.get("type")),
        param=_text(inner.get("param")),
        code=code if isinstance(code, str) and not code.isdigit() else None,
        status=status,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def from_status(status: int, body: object, headers: Mapping[str, str], where: str) -> Failed:
    """Return the failure of a response with an HTTP status of 400 and above."""
    details = read_error_body(body)
    text = f"{where} answered {status}: {details.message or 'no text'}"
    failed = _by_status(status, details, text, read_retry_after(headers))
    ruling = headers.get("x-should-retry")
    if ruling == "false":
        failed.repeat = Repeat.NEVER if failed.repeat is Repeat.NEVER else Repeat.ELSEWHERE
    elif ruling == "true" and not isinstance(failed.error, RequestError | AuthError):
        failed.repeat = Repeat.ANYWHERE
    return failed


def from_event(error: object, where: str) -> Failed:
    """Return the failure of an `{"error": …}` event inside a stream."""
    details = read_error_body({"error": error})
    text = f"{where} ended the stream with an error: {details.message or 'no text'}"
    if details.status is None or details.status < 400:
        error_of = DeviceMemoryError if _MEMORY.search(details.message) else BackendResponseError
        return Failed(error_of(text, code=details.code), Repeat.ANYWHERE, Impact.FAULT)
    return _by_status(details.status, details, text, None)


def _by_status(status: int, details: ErrorBody, text: str, retry_after: float | None) -> Failed:
    if status in (401, 403):
        return Failed(AuthError(text, hint="check the API key"), Repeat.ELSEWHERE, Impact.FAULT, untouched=True)
    if status == 404:
        return _not_found(details, text)
    if status == 408 or status == 504:
        return Failed(BackendTimeoutError(text), Repeat.ANYWHERE, Impact.FAULT)
    if status in (429, 529):
        error = RateLimitError(text, retry_after=retry_after, code=details.code)
        spent = "insufficient_quota" in (details.code, details.type) or (retry_after or 0) > LONGEST_RETRY_AFTER
        return Failed(
            error, Repeat.ELSEWHERE if spent else Repeat.ANYWHERE, Impact.BUSY, retry_after=retry_after, untouched=True
        )
    if status == 409:
        return Failed(BackendUnavailableError(text), Repeat.ANYWHERE, Impact.NONE, retry_after=retry_after)
    if 400 <= status < 500:
        return _refused(status, details, text)
    if _MEMORY.search(details.message):
        return Failed(DeviceMemoryError(text), Repeat.ANYWHERE, Impact.FAULT, retry_after=retry_after)
    if status in (502, 503):
        return Failed(
            BackendUnavailableError(text),
            Repeat.ANYWHERE,
            Impact.FAULT,
            retry_after=retry_after,
            untouched=status == 503,
        )
    repeat = Repeat.ELSEWHERE if status in (501, 505) else Repeat.ANYWHERE
    return Failed(BackendResponseError(text), repeat, Impact.FAULT, retry_after=retry_after)


def _not_found(details: ErrorBody, text: str) -> Failed:
    error: QvlError
    if "model" in f"{details.message} {details.code} {details.type}".lower():
        error = UnknownNameError(text, param="model", code="model_not_found")
    else:
        error = BackendResponseError(text, hint="does the base URL end in /v1?")
    return Failed(error, Repeat.ELSEWHERE, Impact.FAULT, untouched=True)


def _refused(status: int, details: ErrorBody, text: str) -> Failed:
    error: RequestError
    code = details.code or ""
    if code == ContextLengthError.default_code or _CONTEXT.search(details.message):
        error = ContextLengthError(text, param=details.param)
    elif code.startswith(("image_", "invalid_image")) or _PICTURE.search(details.message):
        error = MediaError(text, param=details.param, code=details.code)
    elif code in ("unsupported_parameter", "unsupported_value") or _UNSUPPORTED.search(
        f"{details.type} {details.message}"
    ):
        error = UnsupportedInputError(text, param=details.param, code=details.code)
    elif status in (405, 406, 415):
        hint = "does the base URL end in /v1?"
        return Failed(BackendResponseError(text, hint=hint), Repeat.ELSEWHERE, Impact.FAULT, untouched=True)
    elif status == 413:
        # A server that says so itself has a way out of its own.
        told = code == TOO_LARGE
        error = RequestError(text, hint=None if told else FEWER, param=details.param, code=code or TOO_LARGE)
    else:
        error = RequestError(text, param=details.param, code=details.code)
    return Failed(error, Repeat.NEVER, Impact.NONE)


def import_openai() -> ModuleType:
    """Return the openai package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(
            "the openai backend needs the openai package", hint=install_line("openai")
        ) from exc
    return openai


def http_library() -> ModuleType:
    """Return the HTTP package under the installed openai client: httpx2 for openai 3.x, httpx for 2.x."""
    import importlib

    bases = import_openai().DefaultAsyncHttpxClient.__mro__
    return importlib.import_module(
        next(base.__module__.split(".")[0] for base in bases if base.__module__.startswith("httpx"))
    )


@contextmanager
def crossing(where: str) -> Iterator[None]:
    """Turn exceptions of the openai client and its HTTP library into `Failed`; qvl's own pass unchanged."""
    openai, http = import_openai(), http_library()
    try:
        yield
    except BackendResponseError as exc:
        raise broken(exc.message, where) from exc
    except openai.APIStatusError as exc:
        raise from_status(exc.status_code, exc.body, exc.response.headers, where) from exc
    except openai.APITimeoutError as exc:
        raise down("connecting timed out", where, hint="see connect_timeout") from exc
    except openai.APIConnectionError as exc:
        raise _no_connection(exc, where) from exc
    except openai.APIError as exc:
        raise from_event(exc.body if exc.body is not None else exc.message, where) from exc
    except openai.OpenAIError as exc:
        raise Failed(
            BackendError(f"{where}: the openai client failed: {shorten(str(exc))}"), Repeat.NEVER, Impact.NONE
        ) from exc
    except http.TimeoutException as exc:
        raise too_slow("the connection stalled", where) from exc
    except http.TransportError as exc:
        raise cut_off(f"the connection broke off: {_reason(exc)}", where) from exc
    except (http.InvalidURL, http.HTTPError, http.StreamError) as exc:
        raise broken(f"HTTP error: {_reason(exc)}", where) from exc


def _no_connection(exc: BaseException, where: str) -> Failed:
    chain = list(_causes(exc))
    secure = next((cause for cause in chain if isinstance(cause, ssl.SSLError)), None)
    names = {type(cause).__name__ for cause in chain}
    reason = _reason(chain[-1])
    if secure is not None or any("SSL" in str(cause) or "TLS" in str(cause) for cause in chain):
        failed = down(f"TLS failed: {_reason(secure or chain[-1])}", where, hint="see verify=")
        failed.repeat = Repeat.ELSEWHERE
        return failed
    if names & {"ReadError", "RemoteProtocolError", "WriteError"}:
        return down(f"the connection broke off: {reason}", where, untouched=False)
    if "UnsupportedProtocol" in names or "LocalProtocolError" in names:
        return Failed(BackendUnavailableError(f"{where}: {reason}"), Repeat.ELSEWHERE, Impact.DOWN, untouched=True)
    return down(f"cannot connect: {reason}", where)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    visited: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in visited:
        visited.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _reason(exc: BaseException) -> str:
    return shorten(str(exc)) or type(exc).__name__
