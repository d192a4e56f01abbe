"""The choice of a replica: the one that has cached the picture, unless it is much busier than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qvl.backends.openai.hash_ring import HashRing

# Consistent hashing with bounded loads (Mirrokni et al. 2018), with room for the requests that batch well anyway.
BUSIER: Final = 1.25
SLACK: Final = 8


@dataclass(frozen=True, slots=True)
class Route:
    """The first argument of every call, for the router: a picture's hash, and replicas that failed this request."""

    key: str | None = None
    avoid: frozenset[str] = frozenset()


class PictureRouter(RequestRouter):  # type: ignore[misc]
    """Routes equal pictures to the same replica, from any process; a request without picture to the least busy one."""

    _of: frozenset[str] = frozenset()
    _ring: HashRing = HashRing({})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas in the order of preference; Serve takes the least busy one of a group."""
        if not candidate_replicas:
            return []
        args: list[object] = pending_request.args if pending_request is not None else []
        route = args[0] if args and isinstance(args[0], Route) else Route()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        well = [replica for name, replica in by_name.items() if name not in route.avoid]
        shunned = [replica for name, replica in by_name.items() if name in route.avoid]
        if route.key is None:
            return [group for group in (well, shunned) if group]
        if by_name.keys() != self._of:
            self._of, self._ring = frozenset(by_name), HashRing(dict.fromkeys(by_name, 1.0))
        order = [by_name[name] for name in self._ring.order(route.key) if name not in route.avoid]
        # None for a replica that has not been asked lately: then it has nothing to do.
        waiting = {n: self.replica_queue_len_cache.get(replica.replica_id) or 0 for n, replica in by_name.items()}
        bound = BUSIER * sum(waiting.values()) / len(waiting) + SLACK
        ready = [replica for replica in order if waiting[replica.replica_id.unique_id] <= bound]
        late = [replica for replica in order if replica not in ready]
        return [[replica] for replica in (*ready, *late, *shunned)]
