"""The Ray Serve deployment that runs one backend in each replica's process."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from qvl.backends.base import Backend, Capabilities
from qvl.backends.ray.router import Route
from qvl.errors import BackendUnavailableError, ConfigError, QvlError
from qvl.types import ChatRequest, Chunk, JsonMapping

# A message between processes costs more than a token: after the first one, they travel in bundles.
BUNDLE_SECONDS: Final = 0.03
FAILURE_SHOWN: Final = 20.0
CPU_MEMORY_SHARE: Final = 0.3
VISIBLE: Final = ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class About:
    """The description of one replica: name, host, facts of its backend, or the `failure` of opening it."""

    replica: str
    node: str
    host: str
    pid: int
    devices: Mapping[str, str]
    model: str
    identity: JsonMapping
    capabilities: Capabilities
    device: str
    adapters: Mapping[str, str]
    failure: QvlError | None = None


def build(
    model: str | None,
    options: Mapping[str, object],
    kind: str | None,
    replicas: int = 1,
    plugins: Iterable[object] = (),
    dtype: str | None = None,
) -> Backend:
    """Return the unopened backend of a replica; `kind` is its device, `replicas` their number.

    `dtype` is used on a CPU where no other is named: what a processor chooses by measurement is not the same on every
    host, and answers of one dtype are not the other's in the cache.

    Raises:
        ConfigError: the backend or an option is unknown, or the backend computes elsewhere (openai, ray).
    """
    from qvl.plugins.host import PluginHost, resolve
    from qvl.plugins.names import split_model

    host = PluginHost(plugins)
    name, rest = ("local", None) if model is None else split_model(model, host.backends.factories)
    if name in ("openai", "ray"):
        raise ConfigError(
            f"the backend {name!r} cannot run as replicas",
            hint="several endpoints: --base-url, repeated" if name == "openai" else "leave the second 'ray:' out",
            param="replicas",
        )
    factory = resolve(host.backends.factories[name], f"backend {name!r}")
    arguments = dict(options)
    takes = inspect.signature(factory).parameters
    if kind is not None and "device" in takes:
        arguments.setdefault("device", kind)
    if dtype and "dtype" in takes and str(arguments.get("device")) == "cpu":
        arguments.setdefault("dtype", dtype)
    if kind == "cpu" and "kv_memory_share" in takes and not arguments.get("kv_cache_bytes"):
        # The replicas of a host share its memory, and each takes its share before the others have filled theirs.
        arguments.setdefault("kv_memory_share", CPU_MEMORY_SHARE / replicas)
    backend: Backend = host.backends.build(name, rest, **arguments)
    return backend


class EngineReplica:
    """A Ray Serve deployment, which Serve starts, health-checks and replaces."""

    async def __init__(self, make: Callable[[], Backend]) -> None:  # type: ignore[misc]
        from ray import serve

        self._replica = serve.get_replica_context().replica_id.unique_id
        self._failure: QvlError | None = None
        self._since = 0.0
        self._backend: Backend | None = None
        try:
            self._backend = make()
            await self._backend.open()
        except QvlError as exc:
            # Told to whoever asks, in one line; an exception here would make Serve try again twenty times.
            self._failure, self._since = exc, time.monotonic()

    async def about(self, route: Route) -> About:
        """Return name, host, process, devices and backend of this replica, and the error if that failed to open.

        `route` is not read here: `PictureRouter` chooses the replica by the first argument of a call.
        """
        import ray

        backend = self._backend
        describe = getattr(backend, "describe", None)
        return About(
            replica=self._replica,
            node=ray.get_runtime_context().get_node_id(),
            host=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            devices={name: os.environ[name] for name in VISIBLE if name in os.environ},
            model=backend.model if backend else "",
            identity=backend.identity() if backend and not self._failure else {},
            capabilities=backend.capabilities if backend else Capabilities(),
            device=str(describe()) if callable(describe) and not self._failure else "",
            adapters=backend.adapters() if backend and not self._failure else {},
            failure=self._failure,
        )

    async def stream(self, route: Route, request: ChatRequest) -> AsyncGenerator[str | list[Chunk] | QvlError, None]:
        """Yield the replica's name, then bundles of chunks, at last the error, if there is one."""
        yield self._replica
        if self._backend is None or self._failure is not None:
            yield BackendUnavailableError(f"a replica is not open: {self._failure}")
            return
        try:
            async with aclosing(bundled(self._backend.stream(request))) as bundles:
                async for bundle in bundles:
                    yield bundle
        except QvlError as exc:
            yield exc

    async def check_health(self) -> None:
        """Raise if the backend is not ready; Serve calls this periodically and then replaces the replica."""
        if self._failure is not None:
            # Serve asks at once; first the front must hear the reason, or all it has is that something failed.
            if time.monotonic() - self._since > FAILURE_SHOWN:
                raise RuntimeError(str(self._failure))
            return
        reason = self._backend.unready() if self._backend is not None else "no backend"
        if reason is not None:
            raise RuntimeError(reason)


async def bundled(
    stream: AsyncGenerator[Chunk, None], pause: float = BUNDLE_SECONDS
) -> AsyncGenerator[list[Chunk], None]:
    """Yield the chunks of `stream` in bundles: the first at once, then those of every `pause` seconds."""
    box: deque[Chunk] = deque()
    filled, ended = asyncio.Event(), asyncio.Event()

    async def pump() -> None:
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    box.append(chunk)
                    filled.set()
        finally:
            ended.set()
            filled.set()

    pumping = asyncio.create_task(pump())
    try:
        while True:
            await filled.wait()
            filled.clear()
            if box:
                bundle = list(box)
                box.clear()
                yield bundle
            if ended.is_set() and not box:
                await pumping
                return
            # wait() and not wait_for(): a timeout is the rule here, and must not cost a cancelled task each time.
            await asyncio.wait({pumping}, timeout=pause)
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
