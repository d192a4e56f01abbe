"""Authentication: API keys, compared in constant time, reloaded without a restart."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.errors import ConfigError
from qvl.log import logger
from qvl.server.answers import dumps
from qvl.server.errors import InvalidKeyError, error_of, headers_of, status_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
log = logger("qvl.server")


class KeyRing:
    """The accepted API keys, stored as hashes only, so that no log, dump or error can show one.

    Args:
        keys: accepted keys.
        file: a file of further keys, one per line; `#` starts a comment.

    Raises:
        ConfigError: the file cannot be read, or has no keys.
    """

    def __init__(self, keys: Iterable[str] = (), file: str | None = None) -> None:
        self._fixed = tuple(_digest(key) for key in keys if key)
        self._file = file
        self._digests = self._fixed + (self._read() if file else ())

    @property
    def required(self) -> bool:
        return bool(self._digests)

    @property
    def signing_key(self) -> bytes:
        """The key for what clients carry for the server, the same in every process with these API keys.

        Without API keys it is no secret: a signature then only shows that nothing was changed by mistake.
        """
        return hashlib.sha256(b"qvl signs" + b"".join(sorted(self._digests))).digest()

    def reload(self) -> None:
        """Read the key file again; if it cannot be read, log it and keep the old keys."""
        if self._file is None:
            return
        try:
            self._digests = self._fixed + self._read()
        except ConfigError as exc:
            log.error("the key file was not reloaded, the old keys remain", error=str(exc))
        else:
            log.info("keys reloaded", count=len(self._digests))

    def tenant(self, authorization: bytes | None, api_key: bytes | None = None) -> str:
        """Return a tenant name derived from the key in the `Authorization` header, or in `X-Api-Key`.

        "" if no keys are configured.

        Raises:
            InvalidKeyError: the key is missing or not accepted, or the two headers have different ones.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer":
            key = b""
        other = (api_key or b"").strip()
        if other and authorization and key.strip() != other:
            raise InvalidKeyError("Authorization and X-Api-Key have different keys", hint="send one of them")
        key = key.strip() or other
        if not key:
            raise InvalidKeyError("missing API key", hint="send 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'")
        sent = hashlib.sha256(key).digest()
        # Every key is compared, where `any` would end early, so the time tells nothing about which one was near.
        if not sum(hmac.compare_digest(known, sent) for known in self._digests):
            raise InvalidKeyError("invalid API key", hint="check the key")
        return sent.hex()[:16]

    def accepts(self, tenant: str) -> bool:
        """Return whether the key of `tenant` is accepted (still); "" is everybody where no keys are configured."""
        if not self._digests:
            return tenant == ""
        return any(known.hex()[:16] == tenant for known in self._digests)

    def _read(self) -> tuple[bytes, ...]:
        assert self._file is not None
        try:
            lines = Path(self._file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"the key file {self._file} cannot be read: {reason}", hint="one key a line") from exc
        keys = [line.partition("#")[0].strip() for line in lines]
        digests = tuple(_digest(key) for key in keys if key)
        if not digests:
            raise ConfigError(f"the key file {self._file} has no keys", hint="one key a line")
        return digests


def check_open(host: str, keys: KeyRing, *, allowed: bool) -> None:
    """Check that `host` is a loopback address, a key is required, or unauthenticated access is `allowed`.

    Raises:
        ConfigError: other machines could send requests without a key.
    """
    if host not in LOOPBACK and not keys.required and not allowed:
        raise ConfigError(
            f"cannot listen on {host or 'every address'} without an API key: anybody could send requests",
            hint="--api-key KEY, or --allow-unauthenticated if something in front checks",
        )


class KeyedApp:
    """An ASGI application wrapped so that every request needs an API key."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        try:
            # Two of them are two opinions of who asks.
            self._keys.tenant(sent[0] if len(sent) == 1 else None)
        except InvalidKeyError as exc:
            headers = [(b"content-type", b"application/json"), *headers_of(exc)]
            await send({"type": "http.response.start", "status": status_of(exc), "headers": headers})
            await send({"type": "http.response.body", "body": dumps(error_of(exc))})
            return
        await self._app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.strip().encode()).digest()
