"""The Redis cache on servers of every kind: TLS, a cluster of several nodes, sentinels that change the primary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl.caches.base import Cache
from qvl.caches.redis import open_redis
from qvl.errors import CacheError
from qvl.testing.cache_contract import entry, eventually

from .redis_server import RedisServer, make_certificate, speaks_tls

Serve = Callable[..., RedisServer]
pytestmark = pytest.mark.slow


def works(cache: Cache) -> bool:
    """Whether the cache takes and gives an entry now."""
    try:
        cache.set("works", entry())
        return cache.get("works") == entry()
    except CacheError:
        return False


def test_tls_with_a_certificate_that_is_named(redis_server: Serve, tmp_path: Path) -> None:
    if not speaks_tls():
        pytest.skip("this redis-server was built without TLS")
    certificate, key = make_certificate(tmp_path)
    server = redis_server(
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)),
        *("--tls-auth-clients", "no"),
        tls=True,
    )
    url = f"rediss://127.0.0.1:{server.tls_port}/0"
    with open_redis(f"{url}?front=0&ssl_ca_certs={certificate}") as cache:
        assert works(cache)
        lease = cache.lease("k", 60)
        assert lease is not None
        waiter = threading.Thread(target=cache.wait, args=("k", 60))
        waiter.start()
        cache.release(lease)
        waiter.join(30)
        assert not waiter.is_alive()
    with open_redis(f"{url}?front=0&ssl_cert_reqs=none&ssl_check_hostname=no") as cache:
        assert works(cache)
    with open_redis(f"{url}?front=0") as cache, pytest.raises(CacheError, match=r"(?i)certificate"):
        cache.get("k")
    with open_redis(f"redis://127.0.0.1:{server.tls_port}/0?front=0") as cache, pytest.raises(CacheError):
        cache.get("k")


def make_cluster(redis_server: Serve, count: int) -> list[RedisServer]:
    """Nodes that know of each other and share the 16,384 slots."""
    nodes = [redis_server("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf") for _ in range(count)]
    share = 16384 // count + 1
    for place, node in enumerate(nodes):
        slots = range(place * share, min(16384, (place + 1) * share))
        for first in range(slots.start, slots.stop, 2048):
            numbers = " ".join(str(slot) for slot in range(first, min(first + 2048, slots.stop)))
            assert node.command(f"CLUSTER ADDSLOTS {numbers}".encode()).startswith(b"+OK")
        assert node.command(f"CLUSTER MEET 127.0.0.1 {nodes[0].port}".encode()).startswith(b"+OK")
    for node in nodes:
        eventually(lambda node=node: b"cluster_state:ok" in node.command(b"CLUSTER INFO"), 120)
        eventually(lambda node=node: f"cluster_known_nodes:{count}".encode() in node.command(b"CLUSTER INFO"), 120)
    return nodes


def test_a_cluster_of_three_nodes(redis_server: Serve) -> None:
    nodes = make_cluster(redis_server, 3)
    with open_redis(f"redis+cluster://127.0.0.1:{nodes[1].port}?front=0&rest=0.3") as cache:
        for number in range(300):
            cache.set(f"k{number}", entry(language="en" if number % 2 else "zh"), ttl=600)
        held = [int(node.command(b"DBSIZE")[1:].strip()) for node in nodes]
        # Every node has its part.
        assert min(held) > 30
        assert sum(held) == 300
        assert cache.count_by("language") == {"language": {"en": 150, "zh": 150}}
        assert cache.clear(language="en") == 150
        assert len(list(cache.items())) == cache.stats().entries == 150
        for number in range(6):
            lease = cache.lease(f"k{number}", 60)
            assert lease is not None
            assert cache.lease(f"k{number}", 60) is None
            assert cache.renew(lease, 60)
            woken = threading.Thread(target=cache.wait, args=(lease.key, 60))
            woken.start()
            cache.release(lease)
            woken.join(30)
            assert not woken.is_alive()
            again = cache.lease(f"k{number}", 60)
            assert again is not None
            assert again.token > lease.token
        nodes[2].kill()

        def asks() -> list[Any]:
            found = []
            for number in range(60):
                try:
                    found.append(cache.get(f"k{number * 2}") is not None)
                except CacheError:
                    found.append(None)
            return found

        # A part of the cluster away makes misses, and never another error.
        eventually(lambda: None in asks(), 60)


def test_sentinels_lead_to_the_new_primary_when_the_old_one_dies(redis_server: Serve, tmp_path: Path) -> None:
    primary = redis_server()
    replica = redis_server("--replicaof", "127.0.0.1", str(primary.port))
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"sentinel monitor qvl-main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds qvl-main 500\n"
        "sentinel failover-timeout qvl-main 3000\n"
    )
    eventually(lambda: b"master_link_status:up" in replica.command(b"INFO replication"), 60)
    sentinel = redis_server(str(conf), "--sentinel")
    eventually(lambda: b"slaves=1" in sentinel.command(b"INFO sentinel"), 60)
    with open_redis(f"redis+sentinel://127.0.0.1:{sentinel.port}/qvl-main/0?front=0&rest=0.3") as cache:
        eventually(lambda: works(cache))
        cache.set("kept", entry())
        eventually(lambda: replica.command(b"EXISTS qvl:entry:kept").startswith(b":1"))
        primary.kill()
        eventually(lambda: works(cache), 120)
        assert cache.get("kept") == entry()
        assert b"role:master" in replica.command(b"INFO replication")
