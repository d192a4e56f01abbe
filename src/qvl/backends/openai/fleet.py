"""The endpoints of one backend: probes, health checks, adding and removing.

`EndpointPool` balances the load among them; `OpenAIBackend` sends the requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field
from typing import Final

from qvl.backends.base import Capabilities
from qvl.backends.openai.endpoint import Endpoint, read_url, shown_url
from qvl.backends.openai.endpoint_list import Listed
from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.pool import EndpointPool, EndpointState, Member
from qvl.backends.openai.probe import ASSUMED, Findings, common, probe
from qvl.backends.openai.retry import RetryPolicy
from qvl.errors import (
    BackendError,
    BackendResponseError,
    BackendUnavailableError,
    ConfigError,
    QvlError,
    RateLimitError,
    UnknownNameError,
    UnsupportedInputError,
)
from qvl.log import logger
from qvl.suggest import nearest
from qvl.types import JsonObject

log = logger("qvl.backends.openai")
PROBED: Final[dict[tuple[str, str, str], Findings]] = {}


@dataclass(slots=True)
class ProbedEndpoint:
    """The target of a pool member: an endpoint with the findings of its probe."""

    endpoint: Endpoint
    findings: Findings | None = None
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class Attempts:
    """The failures of one request so far, and the endpoints to which it must not be sent again."""

    failures: dict[str, Failed] = field(default_factory=dict)
    round: set[str] = field(default_factory=set)
    never: set[str] = field(default_factory=set)

    def note(self, url: str, failed: Failed, *, repeatable: bool) -> None:
        self.failures[url] = failed
        self.round.add(url)
        if failed.repeat is not Repeat.ANYWHERE or not (repeatable or failed.untouched):
            self.never.add(url)

    @property
    def exclude(self) -> frozenset[str]:
        return frozenset(self.round | self.never)

    def retry_after(self) -> float | None:
        """Return the shortest Retry-After among the endpoints that may be tried again."""
        waits = [
            f.retry_after for url, f in self.failures.items() if f.retry_after is not None and url not in self.never
        ]
        return min(waits, default=None)


@dataclass(eq=False)
class Fleet:
    """A pool of endpoints of one model.

    Args:
        pool: the load balancer with its members.
        model: its name at the endpoints; empty for the only one that they list.
        make: makes the member of an endpoint.
        probes: False assumes every capability instead of probing.
        account: part of the key of cached findings, since they may differ between API keys.
    """

    pool: EndpointPool[ProbedEndpoint]
    model: str
    _: KW_ONLY
    make: Callable[[Listed], Member[ProbedEndpoint]]
    probes: bool
    retry: RetryPolicy
    account: str
    capabilities: Capabilities = ASSUMED.capabilities

    def peek_capabilities(self) -> Capabilities | None:
        """Return the common capabilities if they are known without a request, else None."""
        if not self.probes:
            return self.capabilities
        keys = [self._probe_key(member.target.endpoint) for member in self.pool.members]
        return common([PROBED[key] for key in keys]) if PROBED.keys() >= set(keys) else None

    async def open(self) -> None:
        """Make connections and probe; raises as `OpenAIBackend.open`."""
        try:
            for member in self.pool.members:
                await member.target.endpoint.open()
            if not self.model:
                self.model = await self._only_model()
            if self.probes:
                await self._probe_all()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Abort waiting and running requests, and close connections."""
        self.pool.close()
        for member in self.pool.members:
            await member.target.endpoint.aclose()

    async def _only_model(self) -> str:
        failed: Failed | None = None
        for member in self.pool.members:
            try:
                models = [entry["id"] for entry in await member.target.endpoint.models()]
            except Failed as exc:
                failed = exc
                continue
            if len(models) == 1:
                return str(models[0])
            raise ConfigError(
                f"{member.name} has {len(models)} models", hint=f"name one: {', '.join(models[:8])}", param="model"
            )
        if failed is not None:
            failed.surface()
        raise ConfigError("model is empty, and no endpoint lists models", hint="name the model", param="model")

    async def _probe_all(self) -> None:
        attempts, members = Attempts(), self.pool.members
        failures = await self._probe_members(members)
        for member in members:
            if failed := failures.get(member.name):
                self.pool.record_failure(member, failed)
                attempts.note(member.name, failed, repeatable=False)
        if len(failures) == len(members):
            verdict = self.verdict(attempts)
            if isinstance(verdict, Failed):
                verdict.surface()
            raise verdict
        for url, failed in failures.items():
            log.warning("endpoint left out for now", endpoint=url, error=str(failed.error))
        self._learn()

    async def _probe_members(self, members: Sequence[Member[ProbedEndpoint]]) -> dict[str, Failed]:
        """Probe all members concurrently; return the failures by member name."""
        results = await asyncio.gather(*(self.findings_of(m.target) for m in members), return_exceptions=True)
        failures: dict[str, Failed] = {}
        for member, result in zip(members, results, strict=True):
            if isinstance(result, Failed):
                failures[member.name] = result
            elif isinstance(result, BaseException):
                raise result
        return failures

    def _learn(self) -> None:
        known = [m.target.findings for m in self.pool.members if m.target.findings is not None]
        if known and self.probes:
            self.capabilities = known[0].capabilities if len(known) == 1 else common(known)

    async def findings_of(self, line: ProbedEndpoint) -> Findings:
        """Return the findings on an endpoint, which is probed now if it was not before.

        Raises:
            Failed: it does not answer.
        """
        if line.findings is not None:
            return line.findings
        if not self.probes:
            line.findings = ASSUMED
            return ASSUMED
        key = self._probe_key(line.endpoint)
        async with line.probing:
            if line.findings is None:
                if key not in PROBED:
                    try:
                        PROBED[key] = await probe(line.endpoint, self.model, retry=self.retry)
                    except Failed as failed:
                        raise await self._with_models(failed, line.endpoint) from failed.__cause__
                line.findings = PROBED[key]
                self._learn()
        return line.findings

    def _probe_key(self, endpoint: Endpoint) -> tuple[str, str, str]:
        return endpoint.base_url, self.model, self.account

    async def _with_models(self, failed: Failed, endpoint: Endpoint) -> Failed:
        """Return `failed`; if the model is unknown, with the endpoint's models as its hint."""
        if isinstance(failed.error, UnknownNameError):
            try:
                known = [entry["id"] for entry in await endpoint.models()]
            except Failed:
                return failed
            # Some say it themselves, and say it once.
            if known and not all(name in failed.error.message for name in known):
                failed.error.hint = nearest(self.model, known)
        return failed

    async def watch(self, interval: float) -> None:
        """Check resting endpoints by GET /models every `interval` seconds, so that no request has to try them."""
        while True:
            await asyncio.sleep(interval)
            await self.check(only_resting=True)

    async def check(self, *, only_resting: bool = False) -> list[EndpointState]:
        """Check the health of all endpoints, or the resting ones, by GET /models; return the states of all."""
        members = [m for m in self.pool.members if not m.draining and (m.resting or not only_resting)]
        await asyncio.gather(*(self._check(member) for member in members))
        return self.pool.snapshot()

    async def _check(self, member: Member[ProbedEndpoint]) -> None:
        try:
            await member.target.endpoint.models()
        except Failed as failed:
            if failed.impact is Impact.DOWN:
                self.pool.record_failure(member, failed)
                return
        if member.resting and not member.half_open:
            # It is there; whether it answers is for one request to find out.
            self.pool.try_now(member)

    async def add(self, listed: Listed, *, probe_now: bool) -> None:
        """Probe another endpoint and add it; raises as `OpenAIBackend.add_endpoint`."""
        member = self.make(listed)
        if any(other.name == member.name for other in self.pool.members):
            raise ConfigError(f"the endpoint {member.name} is in the pool already", param="base_url")
        await member.target.endpoint.open()
        try:
            if probe_now:
                await self.findings_of(member.target)
            self.pool.add(member)
        except Failed as failed:
            await member.target.endpoint.aclose()
            failed.surface()
        self._learn()

    async def remove(self, url: str, timeout: float | None) -> None:
        """Drain and remove an endpoint; raises as `OpenAIBackend.remove_endpoint`."""
        name = shown_url(read_url(url))
        self.pool.find(name)
        if sum(not m.draining for m in self.pool.members) < 2:
            raise ConfigError(f"cannot remove {name}, the last endpoint", hint="close the backend", param="base_url")
        await self._retire(self.pool.drain(name), timeout)

    async def _retire(self, member: Member[ProbedEndpoint], timeout: float | None) -> None:
        if await self.pool.remove(member, timeout=timeout):
            await member.target.endpoint.aclose()
            # Another server may stand at the same address when it is added again.
            PROBED.pop(self._probe_key(member.target.endpoint), None)
            self._learn()

    async def take_in(self, listed: Mapping[str, Listed], *, probe_now: bool) -> list[str]:
        """Add those of `listed` that are not in the pool, set weight and limit of the others; return the new names.

        New ones are probed; one that does not answer is added as resting.
        """
        members: dict[str, Member[ProbedEndpoint]] = {}
        failures: dict[str, Failed] = {}
        try:
            # Again and again: what drains may be gone by the time that others were probed.
            while new := self._missing(listed.keys() - members.keys(), listed):
                members |= {member.name: member for member in new}
                for member in new:
                    await member.target.endpoint.open()
                if probe_now:
                    failures |= await self._probe_members(new)
        except BaseException:
            for member in members.values():
                await member.target.endpoint.aclose()
            raise
        for name, one in listed.items():
            if name not in members:
                self.pool.adjust(name, weight=one.weight, limit=one.limit)
                continue
            self.pool.add(members[name])
            if failed := failures.get(name):
                self.pool.record_failure(members[name], failed)
                log.warning("endpoint left out for now", endpoint=name, error=str(failed.error))
        self._learn()
        return list(members)

    def _missing(self, names: Set[str], listed: Mapping[str, Listed]) -> list[Member[ProbedEndpoint]]:
        """Return new members for those of `names` that are not in the pool, in the order of `listed`."""
        present = {member.name for member in self.pool.members}
        return [self.make(one) for name, one in listed.items() if name in names - present]

    def drain_others(self, listed: Mapping[str, Listed]) -> list[Member[ProbedEndpoint]]:
        """Drain the members that are not in `listed`; return them, for `part_with`."""
        return [self.pool.drain(member.name) for member in self.pool.members if member.name not in listed]

    async def part_with(self, members: Iterable[Member[ProbedEndpoint]], *, timeout: float | None) -> None:
        """Remove draining members concurrently, each after its last request."""
        await asyncio.gather(*(self._retire(member, timeout) for member in members))

    async def ask(self, path: str, fields: JsonObject, *, timeout: float) -> JsonObject:
        """Return one endpoint's answer to `fields` at `path`, beside its `/v1`.

        Raises:
            UnsupportedInputError: the endpoint has no such path.
            BackendError: no endpoint is free in time, or it fails.
        """
        ticket = await self.pool.acquire(cost=0.0, until=time.monotonic() + timeout)
        if ticket is None:
            raise BackendUnavailableError("no endpoint could answer", hint="see GET /ready")
        name = ticket.member.name
        try:
            return await ticket.member.target.endpoint.ask(path, fields)
        except Failed as failed:
            lacks = isinstance(failed.error, BackendResponseError) and failed.untouched
            if not lacks:
                failed.surface()
            hint = "an endpoint of vLLM, SGLang or qvl-serve has it"
            raise UnsupportedInputError(f"{name} has no {path}", hint=hint) from failed
        finally:
            ticket.release()

    def verdict(self, attempts: Attempts) -> QvlError | Failed:
        """Return one error for a request that failed at all endpoints, naming each."""
        if len(self.pool) == 1 and len(attempts.failures) == 1:
            return next(iter(attempts.failures.values()))
        messages = {m.name: m.last_error for m in self.pool.members if m.last_error}
        messages |= {url: failed.error.message for url, failed in attempts.failures.items()}
        text = "; ".join(message if url in message else f"{url}: {message}" for url, message in messages.items())
        errors = [failed.error for failed in attempts.failures.values()]
        kinds = {type(error) for error in errors}
        if kinds == {RateLimitError}:
            return RateLimitError(f"every endpoint is full: {text}", retry_after=attempts.retry_after())
        if len(kinds) == 1 and isinstance(errors[0], BackendError | UnknownNameError):
            return type(errors[0])(f"no endpoint could answer: {text}", hint=errors[0].hint)
        return BackendUnavailableError(f"no endpoint could answer: {text or 'none is in the pool'}")
