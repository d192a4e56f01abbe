"""The settings of a server. Times are seconds, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from qvl.errors import ConfigError
from qvl.media.policy import MediaPolicy

MAX_RETRY_AFTER: Final = 120


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and names of one server.

    Args:
        served_model_names: the names that clients may ask for; the first is what `/v1/models` lists first. Empty: the
            backend's own name.
        any_model_name: a request may ask for any other name too, and is answered under it.
        api_keys: accepted keys; empty (and no key file): everybody may ask.
        api_key_file: one key a line, `#` starts a comment; read again by `KeyRing.reload`.
        max_body_bytes: larger bodies are refused (413), by their announcement where there is one.
        body_timeout: a body must arrive within this time and `body_rate` bytes a second beyond it.
        max_concurrent: requests that are at the backend at a time; what exceeds it waits.
        max_queue: requests that may wait; what exceeds it is refused (429).
        max_queue_picture_tokens: picture tokens (pixels / 1024) that may wait.
        max_held_bytes: bodies in memory, all requests together; and as much again for decoded pictures at the backend,
            where what exceeds it waits.
        max_decoded_bytes: decoded pictures of one request, four bytes a pixel; those that pass on undecoded are free.
        requests_per_minute: for each key; None: no limit.
        concurrent_per_key: requests under way for each key; None: no limit.
        request_timeout: longest time from the first byte to the end of an answer; `X-Request-Timeout` may shorten it.
        drain_timeout: how long running requests may go on after SIGTERM.
        stall_timeout: without a token for so long while requests run, the server is not ready.
        canary: a tiny picture is asked about before the server calls itself ready.
        hot_seconds: how long a cached answer that was asked for is kept in memory too, so that one that many ask for
            costs no look into a file; what another process deletes is answered for that long. 0: not at all.
        cors_origins: origins whose pages may call; empty: none.
        media: the gate for pictures in requests; it never opens files.

    Raises:
        ConfigError: a value that cannot work.
    """

    served_model_names: tuple[str, ...] = ()
    any_model_name: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    max_body_bytes: int = 64 * 1024 * 1024
    body_timeout: float = 30.0
    body_rate: int = 16 * 1024
    max_concurrent: int = 256
    max_queue: int = 256
    max_queue_picture_tokens: int = 1_000_000
    max_held_bytes: int = 1024 * 1024 * 1024
    max_decoded_bytes: int = 192 * 1024 * 1024
    requests_per_minute: int | None = None
    concurrent_per_key: int | None = None
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    stall_timeout: float = 120.0
    canary: bool = True
    hot_seconds: float = 5.0
    cors_origins: tuple[str, ...] = ()
    media: MediaPolicy = field(default_factory=lambda: MediaPolicy(allow_files=False))

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_rate", "max_concurrent", "max_held_bytes", "max_decoded_bytes"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_queue", "max_queue_picture_tokens", "drain_timeout", "hot_seconds"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("body_timeout", "request_timeout", "stall_timeout"):
            self._check(name, getattr(self, name) > 0, "above 0, in seconds")
        for name in ("requests_per_minute", "concurrent_per_key"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "1 or more, or none")
        if self.media.allow_files:
            raise ConfigError("a server never opens files for a request", hint="MediaPolicy(allow_files=False)")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"invalid {name}={getattr(self, name)!r}", hint=allowed, param=name)
