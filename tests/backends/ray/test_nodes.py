"""Two hosts, as far as one machine can be two: replicas on both, and what happens when one goes away."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from qvl.chunks import fold
from qvl.testing import EchoBackend
from qvl.testing.asking import ask, collect, square
from qvl.types import ChatRequest, Chunk
from tests.backends.ray.conftest import node
from tests.backends.ray.engines import Marked

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_replicas_on_two_nodes_and_the_loss_of_one_of_them(opened: Any, cluster: Any) -> None:
    # Nothing but the second node has these NPUs free: two replicas on the head, two there.
    second = cluster.add_node(**node(4, resources={"NPU": 2}))
    cluster.wait_for_nodes()
    backend = opened(make=partial(Marked, pause=0.05), devices="npu", replicas=4)
    import ray

    where = {about.replica: about.node for about in backend.replicas()}
    assert sorted(list(where.values()).count(name) for name in set(where.values())) == [2, 2]
    assert {name["NodeID"] for name in ray.nodes() if name["Alive"]} == set(where.values())
    requests = [ask("Count: " + "word " * 120, square((n * 9, 255 - n * 9, n))) for n in range(16)]

    async def run() -> None:
        alone = EchoBackend()
        await alone.open()
        wanted = [fold(await collect(alone, request))[0] for request in requests]
        begun = [asyncio.Event() for _ in requests]

        async def follow(request: ChatRequest, first: asyncio.Event) -> list[Chunk]:
            chunks = []
            async for chunk in backend.stream(request):
                chunks.append(chunk)
                first.set()
            return chunks

        asked = [asyncio.ensure_future(follow(*one)) for one in zip(requests, begun, strict=True)]
        await asyncio.gather(*(event.wait() for event in begun))
        await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)
        assert [fold(chunks)[0] for chunks in await asyncio.gather(*asked)] == wanted
        assert backend.stats()["moved_total"] > 0
        while sum(bool(one["Alive"]) for one in ray.nodes()) > 1:
            await asyncio.sleep(0.2)

    opened.loop.run_until_complete(run())
