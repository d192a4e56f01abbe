"""A Ray cluster of one machine for the whole run, and backends on it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qvl.backends.base import Backend

# Ray's own, none of which is ours to mend.
RAY_WARNINGS = (
    # pydantic 2 about ray.serve.config, at import
    "ignore:Using extra keyword arguments on `Field` is deprecated",
    "ignore:Support for class-based `config` is deprecated",
    "ignore:Pydantic V1 style `@",
    # ray.data's settings about themselves
    r"ignore:`.*:DeprecationWarning:ray\.data\..*",
    # sockets and pipes of its helpers that it leaves to the garbage collector
    "ignore:unclosed:ResourceWarning",
    "ignore:subprocess .* is still running:ResourceWarning",
    "ignore:Implicitly cleaning up:ResourceWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") is not None:
            for text in RAY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(text))


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def node(cpus: int, **more: Any) -> dict[str, Any]:
    """Arguments of a node. Its helpers get ports, since Ray waits only 15 s for them to choose their own."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return {"num_cpus": cpus, "object_store_memory": 200_000_000, "include_dashboard": False, **ports, **more}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args=node(8, resources={"NPU": 2}))
    yield found
    found.shutdown()


@pytest.fixture
def opened(cluster: Any) -> Iterator[Callable[..., Backend]]:
    """Opens RayBackends and closes them; all in one loop, which is `opened.loop`."""
    from qvl.backends.ray.backend import RayBackend

    loop = asyncio.new_event_loop()
    made: list[Backend] = []

    def make(*args: Any, **settings: Any) -> RayBackend:
        settings = {"ray_address": cluster.address, "devices": "cpu", "replicas": 2, "cpus_per_replica": 1, **settings}
        backend = RayBackend(*args, **settings)
        made.append(backend)
        loop.run_until_complete(backend.open())
        return backend

    make.loop = loop  # type: ignore[attr-defined]
    yield make
    for backend in made:
        loop.run_until_complete(backend.aclose())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    import ray

    assert not ray.is_initialized(), "something asked Ray after all backends had left it"
