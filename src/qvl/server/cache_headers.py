"""HTTP cache headers: `Cache-Control` of requests; `Cache-Status` (RFC 9211), `Age` and `X-Qvl-Cache` of answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qvl.caches.policy import CacheMode, CachePolicy
from qvl.errors import RequestError

if TYPE_CHECKING:
    from qvl.server.exchange import Headers
    from qvl.types import CacheState


def policy_of(header: bytes | None, mode: CacheMode, *, deterministic: bool) -> CachePolicy:
    """Return the cache policy of a request: the pipeline's mode, restricted by `Cache-Control`.

    `no-cache` skips the lookup but stores, `no-store` skips both, `max-age=N` ignores entries older than N seconds.

    Raises:
        RequestError: max-age is not a number.
    """
    base = CachePolicy.of(mode, deterministic=deterministic)
    if header is None:
        return base
    read, write, max_age = base.read, base.write, base.max_age
    for directive in header.decode("latin-1").lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name == "no-store":
            read = write = False
        elif name == "no-cache":
            read = False
        elif name == "max-age":
            value = value.strip('" ')
            if not value.isdecimal() or len(value) > 12:
                raise RequestError("Cache-Control: max-age must be a number of seconds", code="invalid_value")
            max_age = float(value)
    if max_age == 0:
        read, max_age = False, None
    return CachePolicy(read=read, write=write, max_age=max_age)


def headers_for(origin: CacheState, policy: CachePolicy, created_at: float) -> Headers:
    """Return the cache headers of an answer; `created_at` is when a hit was generated, in seconds since the epoch."""
    headers: Headers = [(b"x-qvl-cache", origin.encode())]
    if origin == "hit":
        age = max(0, int(time.time() - created_at)) if created_at else 0
        headers.append((b"age", b"%d" % age))
        headers.append((b"cache-status", b"qvl; hit"))
    elif origin == "coalesced":
        headers.append((b"cache-status", b"qvl; fwd=uri-miss; collapsed"))
    elif not policy.used:
        headers.append((b"cache-status", b"qvl; fwd=bypass"))
    else:
        why = b"uri-miss" if policy.read else b"request"
        headers.append((b"cache-status", b"qvl; fwd=%s" % why + (b"; stored" if policy.write else b"")))
    return headers
