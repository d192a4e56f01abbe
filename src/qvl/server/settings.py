"""The settings of a server. Times are seconds, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from qvl.errors import ConfigError
from qvl.media.policy import MediaPolicy

MAX_RETRY_AFTER: Final = 120


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and names of one server.

    Args:
        served_model_names: the model names that requests may use, listed in this order by `/v1/models`. Empty: the
            backend's own name.
        any_model_name: True to accept any other model name too, and to answer under it.
        api_keys: accepted keys; empty (and no key file): no authentication.
        api_key_file: one key per line, `#` starts a comment; read again by `KeyRing.reload`.
        max_body_bytes: larger bodies are refused (413), by their Content-Length if they have one.
        body_timeout: a body must arrive within this time, plus a second for each `body_rate` bytes.
        max_concurrent: requests at the backend at a time; further ones wait.
        max_queue: requests that may wait; further ones are refused (429).
        max_queue_picture_tokens: picture tokens (pixels / 1024) that may wait.
        max_held_bytes: the most bytes of all request bodies in memory (further requests are refused, 429), and also of
            all decoded pictures at the backend (further requests wait).
        max_decoded_bytes: decoded pictures of one request, 4 bytes per pixel; those forwarded undecoded count 0.
        requests_per_minute: per key; None: no limit.
        concurrent_per_key: concurrent requests per key; None: no limit.
        request_timeout: longest time from the first byte to the end of an answer; `X-Request-Timeout` may shorten it.
        drain_timeout: how long running requests may continue after SIGTERM.
        stall_timeout: if no token is generated for this long while requests run, the server is not ready.
        canary: True to answer a request about a tiny picture before the server is ready.
        hot_seconds: how long a cached answer that was read is also kept in memory; entries deleted by another process
            are served for that long. 0: never.
        response_ttl: how long responses are kept for `previous_response_id`, in the cache.
        max_images: the most pictures of a request; None: what the backend takes.
        batch_dir: the folder of files and batches; None: there are none, and their paths answer 404.
        batch_disk_bytes: of all files there; half of it is for one key, where keys are required.
        max_batch_file_bytes: of one uploaded file.
        batch_concurrency: lines of batches at the backend at a time; one while other requests wait.
        cors_origins: origins whose pages may send requests; empty: none.
        media: the media policy for pictures in requests; `allow_files` is for requests that are not from outside.

    Raises:
        ConfigError: a value out of range.
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
    response_ttl: float = 30 * 24 * 3600.0
    max_images: int | None = None
    batch_dir: Path | None = None
    batch_disk_bytes: int = 4 * 1024 * 1024 * 1024
    max_batch_file_bytes: int = 200 * 1024 * 1024
    batch_concurrency: int = 16
    cors_origins: tuple[str, ...] = ()
    media: MediaPolicy = field(default_factory=lambda: MediaPolicy(allow_files=False))

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_rate", "max_concurrent", "max_held_bytes", "max_decoded_bytes"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("batch_disk_bytes", "max_batch_file_bytes", "batch_concurrency"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_queue", "max_queue_picture_tokens", "drain_timeout", "hot_seconds"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("body_timeout", "request_timeout", "stall_timeout", "response_ttl"):
            self._check(name, getattr(self, name) > 0, "above 0, in seconds")
        for name in ("requests_per_minute", "concurrent_per_key"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "1 or more, or none")
        self._check("max_images", self.max_images is None or self.max_images >= 0, "0 or more, or none")
        if self.max_images:
            # Each page of a document is a picture to the backend.
            pages = min(self.max_images, self.media.max_pages)
            object.__setattr__(self, "media", replace(self.media, max_pages=pages))

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"invalid {name}={getattr(self, name)!r}", hint=allowed, param=name)
