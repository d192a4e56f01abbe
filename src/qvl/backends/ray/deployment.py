"""One Ray Serve application: starts, calls and stops it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Final

from qvl.backends.base import Backend
from qvl.backends.ray import cluster
from qvl.backends.ray.replica import About, EngineReplica
from qvl.backends.ray.router import Route
from qvl.errors import (
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    BackendUnavailableError,
    EngineDeadError,
    QvlError,
)
from qvl.ids import new_id
from qvl.log import logger
from qvl.types import ChatRequest, Chunk, canonical_json

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

ENGINE: Final = "engine"
NAMESPACE: Final = "qvl"
HEALTH_PERIOD: Final = 1.0
HEALTH_TIMEOUT: Final = 30.0
ABOUT_SECONDS: Final = 60.0
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}
log = logger("qvl.backends.ray")


class Deployment:
    """A Ray Serve application of replicas, shared by all client processes ("fronts") with the same `settings`.

    Args:
        settings: JSON from which the application is named; None gives it a unique name.
        shared: the cluster outlives this process. The last front that uses the application ends it; fronts that were
            killed do not count.
    """

    def __init__(self, settings: list[object] | None, *, shared: bool) -> None:
        serve = cluster.require_ray("ray.serve")
        identifier = canonical_json(settings) if settings is not None and shared else new_id()
        self.name = "qvl-" + hashlib.sha256(identifier.encode()).hexdigest()[:12]
        self._me = new_id()
        self._front: ActorHandle | None = _stand_for(self.name, self._me) if shared else None
        self._handle: DeploymentHandle = None
        # Serve puts its own level back when it is imported.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)

    def exists(self) -> bool:
        """True if another front has started the application, or is starting it, which is awaited."""
        from ray import serve

        while (app := serve.status().applications.get(self.name)) is not None and app.status == "DEPLOYING":
            time.sleep(HEALTH_PERIOD)
        if app is None or app.status not in ("RUNNING", "UNHEALTHY"):
            return False
        self._handle = serve.get_deployment_handle(ENGINE, self.name)
        return True

    def start(
        self,
        make: Callable[[], Backend],
        *,
        replicas: int,
        actor_options: dict[str, object],
        max_ongoing: int,
        drain_timeout: float,
    ) -> None:
        """Start the replicas and wait until they run.

        Raises:
            BackendUnavailableError: Serve could not start them.
        """
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        engine = serve.deployment(EngineReplica).options(
            name=ENGINE,
            num_replicas=replicas,
            ray_actor_options=actor_options,
            max_ongoing_requests=max_ongoing,
            health_check_period_s=HEALTH_PERIOD,
            health_check_timeout_s=HEALTH_TIMEOUT,
            graceful_shutdown_timeout_s=drain_timeout,
            graceful_shutdown_wait_loop_s=0.1,
            request_router_config=RequestRouterConfig(request_router_class="qvl.backends.ray.router.PictureRouter"),
            logging_config=_QUIET,
        )
        try:
            self._handle = serve.run(engine.bind(make), name=self.name, route_prefix=None)
        except RuntimeError as exc:
            raise BackendUnavailableError(
                f"Ray Serve could not start the replicas: {str(exc).splitlines()[0]}",
                hint="the folder serve, in the logs of Ray's newest session, says why",
            ) from exc

    def about(self, replicas: int) -> tuple[About, ...]:
        """Return the description of each replica.

        Raises:
            QvlError: a replica could not be opened.
        """
        end = time.monotonic() + ABOUT_SECONDS
        replies: dict[str, About] = {}
        while len(replies) < replicas and time.monotonic() < end:
            route = Route(avoid=frozenset(replies))
            one: About = self._handle.about.remote(route).result(timeout_s=ABOUT_SECONDS)
            if one.failure is not None:
                raise one.failure
            replies[one.replica] = one
        return tuple(replies[name] for name in sorted(replies))

    def call(self, key: str | None, avoid: frozenset[str], request: ChatRequest) -> ReplicaCall:
        """Return the call at the replica that the router chooses by `key`, a picture's hash, not one of `avoid`."""
        method = self._handle.options(method_name="stream", stream=True)
        return ReplicaCall(method.remote(Route(key, avoid), request))

    def running(self) -> int:
        """Return the number of running replicas; 0 too if the cluster does not answer."""
        from ray import serve

        try:
            app = serve.status().applications.get(self.name)
        except Exception as exc:  # noqa: BLE001 - Ray raises what it likes when its controller is gone
            log.warning("ray_status", error=f"{type(exc).__name__}: {str(exc)[:200]}")
            return 0
        states = app.deployments[ENGINE].replica_states if app is not None and ENGINE in app.deployments else {}
        return int(sum(count for state, count in states.items() if state == "RUNNING"))

    def stop(self) -> None:
        """Stop the replicas, unless other fronts use them."""
        import ray
        from ray import serve

        if self._handle is not None:
            # It listens to Serve's controller from a thread of its own, which must not outlive the connection.
            self._handle.shutdown()
        if self._front is not None:
            ray.kill(self._front)
            if _others(self.name, self._me):
                return
        serve.delete(self.name)


class ReplicaCall:
    """One request at one replica. `end` must always be called."""

    def __init__(self, response: DeploymentResponseGenerator) -> None:
        self.replica: str | None = None
        # True if the replica's process or its engine died with this request.
        self.died = False
        self._response = response
        self._over = False

    async def bundles(self, deadline: float, closed: asyncio.Event) -> AsyncGenerator[list[Chunk], None]:
        """Yield bundles of chunks, until `deadline` (a time.monotonic()) or until `closed` is set.

        Raises:
            BackendUnavailableError: the replica was lost, or `closed` was set.
            BackendTimeoutError: the deadline passed.
            QvlError: an error of the replica's backend.
        """
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        ending = asyncio.create_task(closed.wait())
        try:
            while True:
                item = await self._next(deadline, ending)
                if isinstance(item, str):
                    self.replica = item
                elif isinstance(item, QvlError):
                    self.died = isinstance(item, EngineDeadError)
                    raise item
                else:
                    yield item
        except StopAsyncIteration:
            self._over = True
        except (RayError, RayServeException) as exc:
            self._over = True
            self.died = self.replica is not None and isinstance(exc, RayActorError)
            raise _translated(exc, self.replica, closed.is_set()) from exc
        finally:
            ending.cancel()

    async def _next(self, deadline: float, ending: asyncio.Task[bool]) -> str | list[Chunk] | QvlError:
        step = asyncio.ensure_future(self._response.__anext__())
        try:
            await asyncio.wait(
                {step, ending}, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if step.done():
                item: str | list[Chunk] | QvlError = step.result()
                return item
            if ending.done():
                raise BackendUnavailableError("the backend was closed while the request was running")
            raise BackendTimeoutError("the answer of the replicas timed out")
        finally:
            if not step.done():
                self.end()
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)

    def end(self) -> None:
        """Abort the request at the replica if it is still running."""
        if not self._over:
            self._over = True
            self._response.cancel()


def _translated(exc: BaseException, replica: str | None, closed: bool) -> BackendError:
    from ray.exceptions import ObjectLostError, RayActorError
    from ray.serve.exceptions import RayServeException

    if closed:
        return BackendUnavailableError("the backend was closed while the request was running")
    where = f"replica {replica}" if replica else "a replica"
    if isinstance(exc, RayActorError | ObjectLostError | RayServeException):
        return BackendUnavailableError(f"{where} was lost: {type(exc).__name__}", hint="Ray is starting another")
    cause = getattr(exc, "cause", None) or exc
    reason = str(cause).strip().splitlines()
    return BackendResponseError(f"{where} failed: {type(cause).__name__}: {reason[-1] if reason else ''}"[:400])


def _stand_for(name: str, me: str) -> ActorHandle:
    """Return a small actor that marks this front as alive for others; it ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Front:
        def ready(self) -> bool:
            return True

    # On this host: it stands for this process, and another host may be gone before Ray has noticed.
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Front).options(name=f"{name}/{me}", namespace=NAMESPACE, num_cpus=0, scheduling_strategy=node)
    front = actor.remote()
    ray.get(front.ready.remote())
    return front


def _others(name: str, me: str) -> bool:
    """True if another front of the application `name` is alive."""
    import ray

    known = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return any(other.startswith(f"{name}/") and other != f"{name}/{me}" for other in known if other)
