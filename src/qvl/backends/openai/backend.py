"""The `openai` backend: any OpenAI-compatible endpoint, or several as a pool.

One endpoint is a pool of one, so retries, health, limits and counters are the same code. The endpoints' capabilities
are probed when the backend is opened, once a process for each (URL, model).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from qvl.backends.base import CUT_OFF, Backend, Capabilities, Tokens, began
from qvl.backends.endless import EndlessWatch
from qvl.backends.openai.endpoint import OPENAI_URL, Endpoint, Timeouts, read_url, shown_url, split_urls
from qvl.backends.openai.endpoint_list import Listed, by_name
from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.fleet import Attempts, Fleet, ProbedEndpoint
from qvl.backends.openai.pool import EndpointPool, EndpointState, Member, Policy, Ticket, weights_by_url
from qvl.backends.openai.retry import RetryPolicy
from qvl.backends.openai.wire import Dialect, request_body
from qvl.errors import BackendResponseError, BackendUnavailableError, QvlError
from qvl.log import logger
from qvl.media.gate import SMALL
from qvl.types import ChatRequest, Chunk, JsonObject, Timing

log = logger("qvl.backends.openai")
PATCH: Final = 32
TEXT_PER_TOKEN: Final = 4
# The fields of a request that shape its prompt.
_OF_A_PROMPT: Final = frozenset(
    {"model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
)


class OpenAIBackend(Backend):
    """Client of OpenAI-compatible endpoints: OpenAI, vLLM, SGLang, LMDeploy, Ollama, `transformers serve`, `qvl-serve`.

    Args:
        model: the model's name at the endpoint; empty for the only one that the endpoint lists.
        base_url: one URL or several (or `Listed` ones, with weight and limit); default `OPENAI_BASE_URL`, else OpenAI's
            own. `/v1` is added to a bare host.
        api_key: default `OPENAI_API_KEY`.
        connect_timeout: seconds; `first_token_timeout`, `token_timeout` (between tokens) and `total_timeout` (with all
            retries) likewise.
        max_retries: further rounds over the endpoints after a temporary failure; never after the first token.
        probe: False skips the probe: every capability is assumed, and unsupported requests fail at the endpoint.
        extra_headers: headers sent with every request.
        policy: `least_outstanding` picture tokens, `round_robin`, or `affinity` (same picture, same endpoint).
        weights: weights of the endpoints, by URL or in their order; 1 by default.
        limit: most concurrent requests of an endpoint; further ones wait in the client.
        verify: False trusts any certificate; a path is a file of certificate authorities.
        health_interval: seconds between checks of resting endpoints, if there are several; None disables them.
        identity: name of the deployment behind the endpoints, for cache keys. By default the set of base URLs,
            because equal model names at different URLs need not be equal models; a name keeps the cache valid when
            endpoints change.

        Raises:
            ConfigError: an argument is invalid.
    """

    name = "openai"
    shareable = True
    wants_pixels = False
    splits_thought = True

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str | Sequence[str | Listed] | None = None,
        api_key: str | None = None,
        connect_timeout: float = 5.0,
        first_token_timeout: float = 120.0,
        token_timeout: float = 60.0,
        total_timeout: float = 600.0,
        max_retries: int = 2,
        probe: bool = True,
        extra_headers: Mapping[str, str] | None = None,
        policy: Policy = "least_outstanding",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        limit: int | None = None,
        verify: bool | str = True,
        health_interval: float | None = 10.0,
        identity: str | None = None,
    ) -> None:
        self.model = model
        self._timeouts = Timeouts(connect_timeout, first_token_timeout, token_timeout, total_timeout)
        self._retry = RetryPolicy(max_retries)
        self._api_key = api_key
        self._headers = dict(extra_headers or {})
        self._verify = verify
        self._limit = limit
        self._identity = identity
        self._health_interval = health_interval
        endpoints = by_name(self._listed(base_url))
        if weights is not None:
            if isinstance(weights, Mapping):
                weights = {shown_url(read_url(url)): weight for url, weight in weights.items()}
            shares = weights_by_url(endpoints, weights)
            endpoints = {name: replace(one, weight=shares[name]) for name, one in endpoints.items()}
        self._pool: EndpointPool[ProbedEndpoint] = EndpointPool(map(self._member, endpoints.values()), policy=policy)
        self._fleet = Fleet(
            self._pool,
            model,
            make=self._member,
            probes=probe,
            retry=self._retry,
            account=api_key or os.environ.get("OPENAI_API_KEY", ""),
        )
        self._is_open = False
        self._opening = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._health: asyncio.Task[None] | None = None
        self._running = 0
        self._counts = dict.fromkeys(("requests", "retries", "failovers", "failures"), 0)

    def _listed(self, base_url: str | Iterable[str | Listed] | None) -> list[Listed]:
        """Return the endpoints of `base_url`, each with its weight and limit."""
        if base_url is None:
            base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        if isinstance(base_url, str):
            base_url = split_urls(base_url)
        listed = [one if isinstance(one, Listed) else Listed(one) for one in base_url]
        return [replace(one, limit=one.limit or self._limit) for one in listed]

    def _member(self, listed: Listed) -> Member[ProbedEndpoint]:
        endpoint = Endpoint(
            listed.url, api_key=self._api_key, timeouts=self._timeouts, headers=self._headers, verify=self._verify
        )
        return Member(endpoint.url, ProbedEndpoint(endpoint), weight=listed.weight, limit=listed.limit)

    @property
    def capabilities(self) -> Capabilities:
        return self._fleet.capabilities

    def identity(self) -> JsonObject:
        """Return backend, model, and the set of base URLs or `identity` in its place."""
        where = self._identity or sorted(member.target.endpoint.identity for member in self._pool.members)
        return {"backend": self.name, "model": self.model, "endpoints": where}

    def peek_identity(self) -> JsonObject | None:
        return self.identity() if self.model else None

    def peek_capabilities(self) -> Capabilities | None:
        return self.capabilities if self._is_open else self._fleet.peek_capabilities()

    async def open(self) -> None:
        """Open connections and probe every endpoint.

        Raises:
            BackendUnavailableError: no endpoint answers; the message names each.
            UnknownNameError: the endpoint does not have the model.
            AuthError: the endpoint rejects the key.
            ConfigError: `model` is empty and the endpoint has several models.
        """
        async with self._opening:
            if self._is_open:
                return
            await self._fleet.open()
            self.model = self._fleet.model
            self._is_open = True
            self._watch()

    def _watch(self) -> None:
        """Start the health checks of resting endpoints, once there are several endpoints."""
        if self._is_open and self._health is None and self._health_interval is not None and len(self._pool) > 1:
            self._health = asyncio.create_task(self._fleet.watch(self._health_interval))

    async def aclose(self) -> None:
        self._is_open = False
        health, self._health = self._health, None
        if health is not None:
            health.cancel()
            await asyncio.gather(health, return_exceptions=True)
        await self._fleet.aclose()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        if not self._is_open:
            raise BackendUnavailableError(f"openai:{self.model} is not open", hint="await backend.open()")
        started = time.monotonic()
        self._running += 1
        self._counts["requests"] += 1
        try:
            async with aclosing(self._answer(request)) as chunks:
                first = 0.0
                async for chunk in chunks:
                    first = first or time.monotonic() - started
                    if chunk.usage is not None:
                        queued = chunk.timing.queue if chunk.timing else 0.0
                        total = time.monotonic() - started
                        chunk = replace(chunk, timing=Timing(queue=queued, first_token=first, total=total))
                    yield chunk
        except Failed as failed:
            self._counts["failures"] += 1
            raise failed.error from failed.__cause__
        except QvlError:
            self._counts["failures"] += 1
            raise
        finally:
            self._running -= 1

    async def tokenize(self, prompt: ChatRequest | str, *, texts: bool = False) -> Tokens:
        fields: JsonObject = {"model": self.model, "prompt": prompt}
        if isinstance(prompt, ChatRequest):
            body = await asyncio.to_thread(request_body, prompt, self.model, Dialect())
            fields = {name: value for name, value in json.loads(body).items() if name in _OF_A_PROMPT}
        if texts:
            fields["return_token_strs"] = True
        answer = await self._fleet.ask("/tokenize", fields, timeout=self._timeouts.first_token)
        ids, words = answer.get("tokens"), answer.get("token_strs")
        if not isinstance(ids, list):
            raise BackendResponseError("the endpoint's answer has no tokens", hint="is it an endpoint of vLLM's kind?")
        return Tokens(tuple(ids), tuple(words) if texts and isinstance(words, list) else None)

    async def detokenize(self, ids: Sequence[int]) -> str:
        fields = {"model": self.model, "tokens": list(ids)}
        answer = await self._fleet.ask("/detokenize", fields, timeout=self._timeouts.first_token)
        text = answer.get("prompt", answer.get("text"))
        if not isinstance(text, str):
            raise BackendResponseError("the endpoint's answer has no prompt", hint="is it an endpoint of vLLM's kind?")
        return text

    async def _answer(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of the first endpoint that begins one; tries endpoints and rounds until then."""
        deadline = began() + self._timeouts.total
        key = request.pictures[0].sha256 if request.pictures else None
        cost = picture_tokens(request)
        repeatable = _repeatable(request)
        attempts, rounds = Attempts(), 0
        while True:
            queued = time.monotonic()
            ticket = await self._pool.acquire(cost=cost, key=key, exclude=attempts.exclude, until=deadline)
            if ticket is None:
                await self._next_round(attempts, rounds, deadline)
                rounds += 1
                continue
            if attempts.failures:
                elsewhere = ticket.member.name not in attempts.failures
                self._counts["failovers" if elsewhere else "retries"] += 1
            waited = time.monotonic() - queued
            handed_on = False
            try:
                async with aclosing(self._attempt(ticket, request, deadline)) as chunks:
                    async for chunk in chunks:
                        if not handed_on:
                            handed_on = True
                            ticket.first_token()
                        yield replace(chunk, timing=Timing(queue=waited)) if chunk.usage is not None else chunk
                return
            except Failed as failed:
                ticket.failed(failed)
                if handed_on and failed.repeat is Repeat.ANYWHERE and repeatable and self._retry.max_retries:
                    # Not ours to repeat, but a caller that has shown nothing to anybody may.
                    failed.error.code = CUT_OFF
                if handed_on or failed.repeat is Repeat.NEVER:
                    raise
                attempts.note(ticket.member.name, failed, repeatable=repeatable)
                log.info(
                    "endpoint failed",
                    endpoint=ticket.member.name,
                    request_id=request.request_id,
                    error=type(failed.error).__name__,
                )
            finally:
                ticket.release()

    async def _attempt(
        self, ticket: Ticket[ProbedEndpoint], request: ChatRequest, deadline: float
    ) -> AsyncGenerator[Chunk, None]:
        line = ticket.member.target
        joined_late = line.findings is None
        findings = await self._fleet.findings_of(line)
        if joined_late:
            try:
                self.refuse_unsupported(request)
            except QvlError as exc:
                # It has less than the others: this request, which they can serve, goes past it.
                raise Failed(exc, Repeat.ELSEWHERE, Impact.NONE) from None

        def written() -> bytes:
            return request_body(request, self.model, findings.dialect)

        # Scaling and encoding megapixels would hold up every other stream.
        body = written() if _is_small(request) else await asyncio.to_thread(written)
        async with aclosing(
            line.endpoint.stream(
                body,
                n=request.sampling.n,
                deadline=deadline,
                request_id=request.request_id,
                repeatable=_repeatable(request),
                thinks="thinking" in self.model.lower(),
            )
        ) as chunks:
            watch = EndlessWatch(request)
            async for chunk in chunks:
                try:
                    watch.read(chunk)
                except BackendResponseError as exc:
                    raise Failed(exc, Repeat.NEVER, Impact.NONE) from None
                yield chunk

    async def _next_round(self, attempts: Attempts, rounds: int, deadline: float) -> None:
        """Wait until an endpoint is available for another round, or raise one error for all of them."""
        candidates = [m.name for m in self._pool.members if m.name not in attempts.never and not m.draining]
        wait = self._retry.delay(rounds, attempts.retry_after())
        if candidates:
            wait = max(wait, self._pool.next_chance(frozenset(attempts.never)))
        out_of_time = time.monotonic() + wait >= deadline
        if not candidates or rounds >= self._retry.max_retries or out_of_time or not self._is_open:
            raise self._fleet.verdict(attempts)
        await asyncio.sleep(wait)
        attempts.round.clear()

    def endpoints(self) -> list[EndpointState]:
        """Return the state of every endpoint."""
        return self._pool.snapshot()

    async def check(self) -> list[EndpointState]:
        """Return the state of every endpoint after a request for its list of models."""
        return await self._fleet.check()

    async def add_endpoint(self, url: str, *, weight: float = 1.0, limit: int | None = None) -> None:
        """Probe another endpoint and add it to the pool.

        Raises:
            ConfigError: it is in the pool already.
            BackendError: it does not answer, or its answer is invalid.
        """
        async with self._changing:
            (listed,) = self._listed([Listed(url, weight, limit)])
            await self._fleet.add(listed, probe_now=self._is_open)
            self._watch()

    async def remove_endpoint(self, url: str, *, timeout: float | None = None) -> None:
        """Remove an endpoint after its running requests, or after `timeout` seconds; it gets no new ones.

        Raises:
            UnknownNameError: it is not in the pool.
            ConfigError: it is the last one.
        """
        await self._fleet.remove(url, timeout)

    async def set_endpoints(self, base_url: str | Iterable[str | Listed], *, timeout: float | None = None) -> None:
        """Replace the pool's endpoints by `base_url`: adds new ones, removes the others.

        New endpoints are probed first; one that does not answer is added as resting, and tried again later. Removed
        ones get no further requests, finish their running ones (within `timeout` seconds, by default the total timeout
        of a request), and are gone when this returns. Adding one again meanwhile cancels its removal.

        Args:
            base_url: URLs, or `Listed` with weight and limit, as from `read_endpoint_list(path)`.

        Raises:
            ConfigError: the list is empty, or has a duplicate or invalid endpoint; the pool is unchanged.
        """
        listed = by_name(self._listed(base_url))
        async with self._changing:
            added = await self._fleet.take_in(listed, probe_now=self._is_open)
            self._watch()
            # Before another change can begin: what that one names again is then taken back, not drained by this one.
            draining = self._fleet.drain_others(listed)
        await self._fleet.part_with(draining, timeout=self._timeouts.total if timeout is None else timeout)
        log.info("endpoints changed", endpoints=list(listed), added=added, removed=[member.name for member in draining])

    def stats(self) -> Mapping[str, float]:
        states = self._pool.snapshot()
        return {
            "num_running": self._running - self._pool.waiting,
            "num_waiting": self._pool.waiting,
            **{f"{name}_total": count for name, count in self._counts.items()},
            "endpoints": len(states),
            "endpoints_up": sum(state.state in ("up", "busy", "trial") for state in states),
            "picture_tokens_running": sum(state.picture_tokens for state in states),
        }

    def unready(self) -> str | None:
        if not self._is_open:
            return "not open"
        return self._pool.unavailable_reason()


def _repeatable(request: ChatRequest) -> bool:
    """True if the request has no side effects at the endpoint, so that it may be sent once more."""
    return not request.extra.get("store")


def _is_small(request: ChatRequest) -> bool:
    """True if the request can be encoded on the event loop: its pictures are ready and small."""
    most = request.max_pixels
    return all(
        picture.at_hand and len(picture.data) <= SMALL and (most is None or picture.width * picture.height <= most)
        for picture in request.pictures
    )


def picture_tokens(request: ChatRequest) -> float:
    """Return the estimated prompt tokens: one for each 32 x 32 pixels of pictures and each 4 characters of text."""
    characters = sum(len(message.text) for message in request.messages)
    areas = [picture.width * picture.height for picture in request.pictures]
    pixels = sum(min(area, request.max_pixels or area) for area in areas)
    return 1.0 + characters / TEXT_PER_TOKEN + pixels / (PATCH * PATCH)
