"""The exceptions of qvl.

```text
QvlError
├── ConfigError                  an argument or setting is invalid
│   ├── UnknownNameError         unknown backend, cache or model (suggests the nearest name)
│   └── MissingDependencyError   an optional package is absent (names its pip line)
├── PluginError                  a plugin failed to load or broke the hook contract
├── CacheError                   a cache store failed (logged and treated as a miss by the pipeline)
├── RequestError            400  the request is invalid or cannot be served
│   ├── UnsupportedInputError    the backend cannot honour a field of the request
│   ├── MediaError               a picture cannot be read, is refused, or breaks a limit
│   └── ContextLengthError       prompt and answer do not fit the model's context
├── AnalysisError                the model's answer is not a valid analysis (the raw text is kept)
└── BackendError            502  the model could not answer
    ├── AuthError           401  the endpoint refused the credentials
    ├── RateLimitError      429  the endpoint or the local queue is full
    ├── BackendTimeoutError 504  no answer in time
    ├── BackendUnavailableError 503  the endpoint is down, or the model is still loading
    ├── BackendResponseError 502 the endpoint sent an invalid answer
    ├── RefusalError        422  the model declined to answer
    ├── DeviceMemoryError   503  the device ran out of memory for this request
    └── EngineDeadError     503  the engine's loop has ended; only a restart helps
```

A caller needs three class attributes: `retryable` (the same call may succeed later), `status` (the HTTP status a
server answers with) and `code` (OpenAI's machine-readable error code). `hint` is one sentence: how to fix it.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final


class QvlError(Exception):
    """Base class of all errors. `str(error)` is one line: the message, then the hint.

    Args:
        message: the problem, in one line.
        hint: how to fix it, in one line; defaults to the class's own.
        param: the request field at fault, in OpenAI's sense.
        code: overrides the class's machine-readable code.
    """

    retryable: ClassVar[bool] = False
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    default_hint: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, hint: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint if hint is not None else self.default_hint
        self.param = param
        self.code = code or self.default_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are made again from `args` alone, which is not what these take; they must cross processes.
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[QvlError], args: tuple[object, ...], state: dict[str, object]) -> QvlError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(QvlError, ValueError):
    """An argument, setting or environment variable is invalid."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_config"


class UnknownNameError(ConfigError):
    """No backend, cache, model or endpoint has the given name."""

    default_code = "unknown_name"


class MissingDependencyError(ConfigError, ImportError):
    """An optional package is not installed; the hint is the pip line that installs it."""

    default_code = "missing_dependency"


class PluginError(QvlError):
    """A plugin failed to import, misspelt a hook, or registered a name twice."""

    default_code = "plugin_error"


class CacheError(QvlError):
    """A cache store could not be read or written. The pipeline logs it and treats it as a miss."""

    retryable = True
    default_code = "cache_error"


class RequestError(QvlError, ValueError):
    """The request is invalid or cannot be served; sending it again unchanged will not help."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class UnsupportedInputError(RequestError):
    """The backend does not support a field of the request, named by `param`."""

    default_code = "unsupported_parameter"


class MediaError(RequestError):
    """A picture is missing, broken, refused, or larger than the limits allow.

    `picture` is the index of the picture in its request, from 0; None if it was loaded by itself.
    """

    default_code = "invalid_image"
    codes: ClassVar[frozenset[str]] = frozenset(
        {"image_decode_failed", "image_fetch_failed", "image_quarantined", "image_too_large", "image_url_blocked"}
    )
    picture: int | None = None


class ContextLengthError(RequestError):
    """Prompt and requested answer are longer than the model's context."""

    default_code = "context_length_exceeded"


class AnalysisError(QvlError):
    """The model's answer, whose text is `raw`, does not match the schema, even after a retry."""

    status = 502
    default_code = "analysis_failed"

    def __init__(self, message: str, *, raw: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.raw = raw


class BackendError(QvlError):
    """The model could not answer, through no fault of the request."""

    status = 502
    default_code = "backend_error"


class AuthError(BackendError):
    """The endpoint rejected the API key, or no key was sent."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class RateLimitError(BackendError):
    """Too many requests: the endpoint's rate limit is reached, or the local queue is full.

    `retry_after` is the number of seconds after which to try again, None if unknown.
    """

    retryable = True
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        hint: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, param=param, code=code)
        self.retry_after = retry_after


class BackendTimeoutError(BackendError):
    """A timeout: of the connection, the first token, the next token or the whole answer."""

    retryable = True
    status = 504
    default_code = "deadline_exceeded"


class BackendUnavailableError(BackendError):
    """The endpoint cannot be reached, or the model is not loaded (yet)."""

    retryable = True
    status = 503
    default_code = "engine_not_ready"


class BackendResponseError(BackendError):
    """The endpoint sent an invalid answer: a broken stream, HTML, incomplete JSON, an unknown error."""

    default_code = "bad_backend_response"


class RefusalError(BackendError):
    """The model refused to answer (the message quotes it), or a content filter withheld the answer.

    A retry would be refused too, so the request is not repeated, and the refusal not cached.
    """

    status = 422
    type = "invalid_request_error"
    default_code = "refusal"


class DeviceMemoryError(BackendError):
    """The device ran out of memory for this request; other requests continue."""

    retryable = True
    status = 503
    default_code = "device_out_of_memory"


class EngineDeadError(BackendError):
    """The engine's loop failed. No request can be served until it is restarted."""

    status = 503
    default_code = "engine_dead"


# The way out of a write that failed; what the caller has to name differently, and what the machine lacks.
_NAMED_WRONGLY: Final = {
    errno.ENOENT: "name a file in a folder that exists",
    errno.ENOTDIR: "name a file in a folder that exists",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "name a file with a shorter name",
    errno.EACCES: "name a file that you may write",
    errno.EPERM: "name a file that you may write",
    errno.EROFS: "the file system can only be read; name a file on another",
}
_OUT_OF: Final = {
    errno.ENOSPC: "free some space, or name a file on another disk",
    errno.EDQUOT: "your quota on this disk is used up; free some space, or name a file on another disk",
    errno.EFBIG: "the file has reached the largest size allowed; see ulimit -f",
    errno.EMFILE: "too many files are open in this process; raise ulimit -n",
    errno.ENFILE: "too many files are open on this machine; close some programs",
    errno.EIO: "the disk reports a fault; name a file on another",
}


def first_line(reason: object) -> str:
    """Return the first line of an exception's message, or its class name."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0][:300]


def write_failed(what: str, exc: OSError) -> QvlError:
    """Return the error for a file that could not be written; `what` is its path, or its option and path.

    It is a ConfigError if another path helps, else a QvlError.
    """
    message = f"{what} cannot be written: {exc.strerror or exc}"
    if exc.errno in _OUT_OF:
        return QvlError(message, hint=_OUT_OF[exc.errno])
    return ConfigError(message, hint=_NAMED_WRONGLY.get(exc.errno or 0, "name another file"))
