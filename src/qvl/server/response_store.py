"""Responses kept for `previous_response_id` and `GET /v1/responses/{id}`, in the cache that answers are kept in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypedDict, TypeVar

import anyio.to_thread

from qvl.caches.base import Cache, CacheEntry
from qvl.errors import BackendUnavailableError, CacheError, RequestError
from qvl.log import logger
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from qvl.pipeline.cache_store import Store
    from qvl.server.answers import Response
    from qvl.types import JsonObject

T = TypeVar("T")
TASK: Final = "response"
# Turns of one conversation that are looked up, each a read of the store.
MAX_TURNS: Final = 1_000
PREFIX: Final = "resp_"
log = logger("qvl.server")


class KeptResponse(TypedDict):
    """A response, the items that were asked with it, and the response that they followed."""

    response: Response
    input: list[JsonObject]
    previous: str | None


class ResponseStore:
    """Keeps the responses of one server. Those of one namespace (an API key) cannot be read from another.

    Args:
        store: where answers are kept; None if the cache is off.
        ttl: seconds to keep a response.
    """

    def __init__(self, store: Store | None, *, ttl: float) -> None:
        self._store = store
        self._ttl = ttl

    @property
    def available(self) -> bool:
        return self._store is not None

    async def keep(self, namespace: str, kept: KeptResponse) -> bool:
        """Store a response; False if the store failed, which is logged: the answer is worth more than its copy."""
        response = kept["response"]
        entry = CacheEntry(
            result={**kept}, task=TASK, model=response["model"], namespace=namespace, text=_text_of(response)
        )
        key = _key(namespace, response["id"])
        try:
            await self._call(lambda cache: cache.set(key, entry, ttl=self._ttl))
        except CacheError as exc:
            log.warning("a response was not stored", error=str(exc), response=response["id"])
            return False
        return True

    async def find(self, namespace: str, ident: str, param: str | None = None) -> KeptResponse:
        """Return the response `ident`, past any copy in memory: another process may have deleted it.

        Raises:
            HttpError: 404, there is none in this namespace, or it has expired.
            BackendUnavailableError: the store fails.
        """
        key = _key(namespace, ident)
        entry = await self._told(lambda cache: cache.reread(key)) if ident.startswith(PREFIX) else None
        if entry is None or entry.task != TASK:
            raise not_found(ident, param)
        return entry.result  # type: ignore[return-value]  # written by `keep`

    async def delete(self, namespace: str, ident: str) -> None:
        """Delete the response `ident`. Raises as `find`."""
        key = _key(namespace, ident)
        if not await self._told(lambda cache: cache.delete(key)):
            raise not_found(ident)

    async def turns(self, namespace: str, ident: str) -> list[JsonObject]:
        """Return all items of the conversation that ends with the response `ident`, oldest first.

        Raises:
            RequestError: the server keeps no responses, or the conversation is too long.
            HttpError: 404, the response or an earlier one is not there any more.
        """
        param = "previous_response_id"
        if not self.available:
            raise not_kept(param)
        turns: list[list[JsonObject]] = []
        following: str | None = ident
        while following is not None:
            if len(turns) == MAX_TURNS:
                raise RequestError(f"a conversation of more than {MAX_TURNS} turns", param=param, code="invalid_value")
            kept = await self.find(namespace, following, param)
            turns.append([*kept["input"], *(dict(item) for item in kept["response"]["output"])])
            following = kept["previous"]
        return [item for turn in reversed(turns) for item in turn]

    async def _told(self, work: Callable[[Cache], T]) -> T | None:
        if not self.available:
            return None
        try:
            return await self._call(work)
        except CacheError as exc:
            raise BackendUnavailableError("the store of responses does not answer", hint="try again") from exc

    async def _call(self, work: Callable[[Cache], T]) -> T:
        assert self._store is not None
        cache = self._store.cache
        return await anyio.to_thread.run_sync(work, cache)


def not_found(ident: str, param: str | None = None) -> HttpError:
    """Return the error for a response that is not there; that of another key looks the same."""
    code = "previous_response_not_found" if param else "not_found"
    what = f"the response {ident[:100]!r} does not exist, or has expired"
    return HttpError(404, what, hint="send the whole conversation as input", param=param, code=code)


def not_kept(param: str) -> RequestError:
    """Return the error for a request that needs stored responses on a server that keeps none."""
    hint = "start qvl-serve with a --cache, or send the whole conversation as input"
    return RequestError(f"{param}: this server keeps no responses", hint=hint, param=param, code="invalid_value")


def _key(namespace: str, ident: str) -> str:
    return "sha256-" + hashlib.sha256(f"{TASK}\n{namespace}\n{ident}".encode()).hexdigest()


def _text_of(response: Response) -> str:
    """Return the text of a response, for people who look into the cache."""
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])
