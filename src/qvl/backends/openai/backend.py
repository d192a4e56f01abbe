"""The `openai` backend: any OpenAI-compatible endpoint, or several as a pool.

One endpoint is a pool of one, so retries, health, limits and counters are the same code. The endpoints' capabilities
are probed when the backend is opened, once a process for each (URL, model).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from qvl.backends.base import CUT_OFF, Backend, Capabilities, OwnDecisions, Tokens, began
from qvl.backends.openai.course import Course
from qvl.backends.openai.decisions_3_57 import DecisionsProbe
from qvl.backends.openai.endpoint import Endpoint, RunningAnswer, Timeouts, Times, read_url, shown_url
from qvl.backends.openai.endpoint_list import Listed, by_name, listed_endpoints
from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.fleet import Attempts, Fleet, ProbedEndpoint
from qvl.backends.openai.pool import EndpointPool, EndpointState, Member, Policy, Ticket, weights_by_url
from qvl.backends.openai.request_traits import is_small, prompt_fields, refuse_large
from qvl.backends.openai.retry import RetryPolicy
from qvl.backends.openai.wire import request_body
from qvl.backends.quarantine import Quarantine
from qvl.backends.resume import Diverged
from qvl.errors import BackendResponseError, BackendUnavailableError, QvlError
from qvl.evidence.coordinates import Coordinates, coordinates_named
from qvl.log import logger
from qvl.media.gate import hash_pictures
from qvl.media.video_parts import sent_as_pictures
from qvl.types import ChatRequest, Chunk, JsonObject

log = logger("qvl.backends.openai")


class OpenAIBackend(Backend):
    """Client of OpenAI-compatible endpoints: OpenAI, vLLM, SGLang, LMDeploy, Ollama, `transformers serve`, `qvl-serve`.

    Args:
        model: the model's name at the endpoint; empty for the only one that the endpoint lists.
        base_url: one URL or several (or `Listed` ones, with weight and limit); default `OPENAI_BASE_URL`, else OpenAI's
            own. `/v1` is added to a bare host.
        api_key: default `OPENAI_API_KEY`.
        connect_timeout: seconds; `first_token_timeout`, `token_timeout` (between tokens) and `total_timeout` (with all
            retries) likewise.
        max_retries: further rounds over the endpoints after a temporary failure; after the first token only of answers
            that are greedy or have a seed, and only if the repeated answer is the same up to there.
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
        box_convention: how the model writes boxes and points, where its name does not tell: "0-1000" (Qwen3-VL and
            later) or "pixels" of the resized picture (Qwen2.5-VL).
        quarantine: refuse a picture for an hour once two engines died with it; a path keeps such pictures in a file
            for all processes that name it; False tries them on every engine.

        Raises:
            ConfigError: an argument is invalid.
    """

    name = "openai"
    shareable = True
    engines_may_come = True
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
        box_convention: str | None = None,
        quarantine: bool | str = True,
    ) -> None:
        self.model = model
        self._timeouts = Timeouts(connect_timeout, first_token_timeout, token_timeout, total_timeout)
        self._retry = RetryPolicy(max_retries)
        self._api_key = api_key
        self._headers = dict(extra_headers or {})
        self._verify, self._limit = verify, limit
        self._identity = identity
        self._coordinates = None if box_convention is None else coordinates_named(box_convention)
        self._health_interval = health_interval
        endpoints = by_name(listed_endpoints(base_url, self._limit))
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
        self._opening, self._changing = asyncio.Lock(), asyncio.Lock()
        self._health: asyncio.Task[None] | None = None
        self._quarantine = Quarantine(quarantine if isinstance(quarantine, str) else None, on=bool(quarantine))
        self._decisions = DecisionsProbe(self._fleet, first_token_timeout)
        self._running = 0
        self._counts = dict.fromkeys(("requests", "retries", "failovers", "continued", "failures"), 0)

    def _member(self, listed: Listed) -> Member[ProbedEndpoint]:
        endpoint = Endpoint(
            listed.url, api_key=self._api_key, timeouts=self._timeouts, headers=self._headers, verify=self._verify
        )
        return Member(endpoint.url, ProbedEndpoint(endpoint), weight=listed.weight, limit=listed.limit)

    @property
    def coordinates(self) -> Coordinates:
        return self._coordinates or super().coordinates

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
        """Yield the answer of the first endpoint that begins one; tries endpoints and rounds until then.

        An answer that breaks off later goes on at another endpoint, if that gives the same answer up to there.
        """
        self.refuse_unsupported(request)
        if not self._is_open:
            raise BackendUnavailableError(f"openai:{self.model} is not open", hint="await backend.open()")
        self._running += 1
        self._counts["requests"] += 1
        try:
            course = await self._course(request)
            while True:
                ticket = await self._ticket(course)
                try:
                    self._quarantine.refuse(request)
                    answer = await self._begun(course, ticket)
                    try:
                        while chunks := await answer.read():
                            for chunk in chunks:
                                if (rest := course.rest(chunk, ticket)) is not None:
                                    yield rest
                    finally:
                        await answer.aclose()
                    if course.cut is not None:
                        self._counts["continued"] += 1
                    self._quarantine.cleared(request)
                    return
                except Diverged:
                    assert course.cut is not None
                    raise course.cut from None
                except Failed as failed:
                    if not await self._goes_on(failed, course, ticket):
                        if course.cut is not None:
                            raise course.cut from None
                        raise
                finally:
                    ticket.release()
                    if course.suspect:
                        self._quarantine.tried(request, ticket.member.name)
        except Failed as failed:
            self._counts["failures"] += 1
            failed.surface()
        except QvlError:
            self._counts["failures"] += 1
            raise
        finally:
            self._running -= 1

    async def tokenize(self, prompt: ChatRequest | str, *, texts: bool = False) -> Tokens:
        fields = await asyncio.to_thread(prompt_fields, prompt, self.model, self.capabilities)
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

    async def own_decisions(self) -> OwnDecisions | None:
        return await self._decisions.found()

    async def _course(self, request: ChatRequest) -> Course:
        """Return the course of a request that begins; a picture in quarantine is refused."""
        times = Times(time.monotonic())
        affine = bool(request.pictures) and self._pool.policy == "affinity"
        if affine or self._quarantine.watches():
            await hash_pictures(request.pictures)
            self._quarantine.refuse(request)
        return Course(
            request,
            times=times,
            deadline=began() + self._timeouts.total,
            key=request.pictures[0].sha256 if affine else None,
            tries_others=len(self._pool) > 1 and self._retry.max_retries > 0,
        )

    async def _ticket(self, course: Course) -> Ticket[ProbedEndpoint]:
        """Return the slot of the next attempt, after waiting for a free endpoint or for another round."""
        quarantine, request, attempts, taken = self._quarantine, course.request, course.attempts, course.taken
        while True:
            queued = time.monotonic()
            suspect = quarantine.suspects(request)
            exclude = attempts.exclude | quarantine.trying | taken if suspect else attempts.exclude
            ticket = await self._pool.acquire(cost=course.cost, key=course.key, exclude=exclude, until=course.deadline)
            if ticket is None:
                if suspect and await quarantine.one_was_tried(course.deadline, elsewhere=bool(taken)):
                    taken.clear()
                    continue
                try:
                    await self._next_round(attempts, course.rounds, course.deadline)
                except (Failed, QvlError):
                    # The error of the answer that began says more than that of its repetition.
                    if course.cut is not None:
                        raise course.cut from None
                    raise
                course.rounds += 1
                continue
            name = ticket.member.name
            # Others may have found out about its pictures while it waited for the ticket.
            if suspect != quarantine.suspects(request):
                ticket.release()
                continue
            if suspect and not quarantine.begin(request, name):
                # Another suspect is at the engine, or another request with these pictures at any.
                ticket.release()
                taken.add(name)
                continue
            if attempts.failures:
                self._counts["failovers" if name not in attempts.failures else "retries"] += 1
            course.suspect, course.times.queue = suspect, time.monotonic() - queued
            return ticket

    async def _begun(self, course: Course, ticket: Ticket[ProbedEndpoint]) -> RunningAnswer:
        """Return the answer that the ticket's endpoint begins."""
        request, line = course.request, ticket.member.target
        findings = line.findings
        joined_late = findings is None
        if findings is None:
            findings = await self._fleet.findings_of(line)
        # It may have been asked what it takes while the request waited for a place.
        notes: tuple[str, ...] = ()
        if why := findings.capabilities.why_pictures(request):
            notes = sent_as_pictures(request.videos, f"{line.endpoint.url} {why}")
            request = findings.capabilities.taken(request)
        if joined_late:
            try:
                self.refuse_unsupported(request)
            except QvlError as exc:
                # It has less than the others: this request, which they can serve, goes past it.
                raise Failed(exc, Repeat.ELSEWHERE, Impact.NONE) from None
        course.begin(notes)
        # Scaling and encoding megapixels would hold up every other stream.
        write = partial(request_body, request, self.model, findings.dialect)
        body = write() if is_small(request) else await asyncio.to_thread(write)
        refuse_large(body, findings.body_bytes, request, line.endpoint.url)
        return await line.endpoint.answer(
            body,
            n=request.sampling.n,
            deadline=course.deadline,
            request_id=request.request_id,
            repeatable=course.repeatable,
            thinks="thinking" in self.model.lower(),
            times=course.times,
        )

    async def _goes_on(self, failed: Failed, course: Course, ticket: Ticket[ProbedEndpoint]) -> bool:
        """Record the failure of an attempt; return True if there may be another one.

        Raises:
            MediaError: the request's picture is in quarantine now.
        """
        request, name = course.request, ticket.member.name
        ticket.failed(failed)
        if request.pictures and await ticket.member.target.endpoint.died(failed):
            self._quarantine.killed(request, name, suspect=course.suspect)
            self._quarantine.refuse(request)
        if course.begun:
            again = failed.repeat is Repeat.ANYWHERE and course.repeatable and self._retry.max_retries
            if again:
                # Not ours to repeat, but a caller that has shown nothing to anybody may.
                failed.error.code = CUT_OFF
            if not again or course.continuation is None:
                return False
            course.cut = course.cut or failed
            course.continuation.again()
        elif failed.repeat is Repeat.NEVER:
            return False
        course.attempts.note(name, failed, repeatable=course.repeatable)
        log.info(
            "endpoint failed",
            endpoint=name,
            request_id=request.request_id,
            begun=course.begun,
            error=type(failed.error).__name__,
        )
        return True

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
            (listed,) = listed_endpoints([Listed(url, weight, limit)], self._limit)
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
        listed = by_name(listed_endpoints(base_url, self._limit))
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
            "pictures_quarantined": len(self._quarantine),
            "quarantine_refusals_total": self._quarantine.refused,
            "picture_tokens_running": sum(state.picture_tokens for state in states),
        }

    def release_pictures(self) -> None:
        """Release all pictures from quarantine."""
        self._quarantine.release()

    def unready(self) -> str | None:
        if not self._is_open:
            return "not open"
        return self._pool.unavailable_reason()
