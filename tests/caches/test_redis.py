"""What only the Redis cache promises: faults that cost a miss and nothing more, many processes, all kinds of server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.caches.base import Cache
from qvl.caches.redis import RedisCache, open_redis
from qvl.errors import CacheError
from qvl.testing.cache_contract import entry, eventually

from .conftest import Start
from .redis_server import RedisServer

Serve = Callable[..., RedisServer]


@pytest.fixture
def open_on() -> Iterator[Callable[..., RedisCache]]:
    """Opens caches on servers, quick to give up and quick to come back; closes them at the end."""
    opened: list[RedisCache] = []

    def run(server: RedisServer, **options: Any) -> RedisCache:
        opened.append(RedisCache(server.url, **{"socket_timeout": 0.2, "rest": 0.3, **options}))
        return opened[-1]

    yield run
    for cache in opened:
        cache.close()


def works(cache: Cache) -> bool:
    """Whether the cache takes and gives an entry now."""
    try:
        cache.set("works", entry())
        return cache.get("works") == entry()
    except CacheError:
        return False


# The store, as others see it


def test_a_value_is_json_that_people_can_query(shared_redis: RedisServer, redis_url: str) -> None:
    import redis

    with RedisCache(redis_url) as cache, redis.Redis(port=shared_redis.port) as client:
        cache.set("sha256:1", entry(), ttl=100)
        cache.set("sha256:2", entry(analysis=None))
        value = json.loads(client.get("qvl:entry:sha256:1"))
        assert (value["brand"], value["category"], value["attributes"]) == ("Acme", "shoe", {"colour": "red"})
        assert (value["language"], value["created_at"]) == ("zh", entry().created_at)
        assert 90 < client.ttl("qvl:entry:sha256:1") <= 100
        assert client.ttl("qvl:entry:sha256:2") == -1
        assert json.loads(client.get("qvl:entry:sha256:2"))["brand"] is None


def test_clear_leaves_what_is_not_ours(shared_redis: RedisServer, redis_url: str) -> None:
    import redis

    with (
        RedisCache(redis_url, prefix="a*[b]:") as ours,
        RedisCache(redis_url, prefix="axb:") as theirs,
        redis.Redis(port=shared_redis.port) as client,
    ):
        client.set("somebody:else", "1")
        for number in range(500):
            ours.set(f"k{number}", entry())
        theirs.set("k", entry())
        assert len(list(ours.items())) == 500
        assert ours.clear() == 500
        assert theirs.get("k") is not None
        assert client.get("somebody:else") == b"1"


def test_something_else_under_our_key_is_a_miss_and_is_replaced(shared_redis: RedisServer, redis_url: str) -> None:
    import redis

    with RedisCache(redis_url) as cache, redis.Redis(port=shared_redis.port) as client:
        client.rpush("qvl:entry:list", "a", "b")
        client.set("qvl:entry:text", "no json")
        client.set("qvl:entry:bytes", b"\xff\xfe\x00")
        client.set("qvl:entry:later", '{"v": 99}')
        cache.set("good", entry())
        for key in ("list", "text", "bytes", "later"):
            assert cache.get(key) is None
        assert [key for key, _ in cache.items()] == ["good"]
        assert cache.clear(language="zh") == 1
        assert cache.stats().errors == 4
        for key in ("list", "text", "bytes", "later"):
            cache.set(key, entry())
            assert cache.get(key) == entry()


# Many processes


@pytest.mark.slow
def test_of_sixteen_processes_one_computes(redis_url: str, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "computed"
    askers = [start("single_flight", redis_url, log, index) for index in range(16)]
    assert [asker.wait(120) for asker in askers] == [0] * 16
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_holder_loses_its_lease_by_time(redis_url: str, start: Start) -> None:
    holder = start("hold", redis_url, 1.0)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with RedisCache(redis_url) as cache:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        eventually(lambda: cache.wait("k", 5) or cache.lease("k", 60) is not None)


def test_waiters_sleep_on_the_server_and_all_wake(shared_redis: RedisServer, redis_url: str) -> None:
    def calls() -> int:
        info = shared_redis.command(b"INFO commandstats").decode()
        return sum(int(line.split("calls=")[1].split(",")[0]) for line in info.splitlines() if "calls=" in line)

    with RedisCache(redis_url) as cache:
        lease = cache.lease("k", 600)
        assert lease is not None
        before = calls()
        waiters = [threading.Thread(target=cache.wait, args=("k", 60)) for _ in range(5)]
        for waiter in waiters:
            waiter.start()
        eventually(lambda: b":5" in shared_redis.command(b"PUBSUB NUMSUB " + cache._channel("k").encode()))
        cache.release(lease)
        for waiter in waiters:
            waiter.join(30)
        assert not any(waiter.is_alive() for waiter in waiters)
        assert calls() - before < 100


# Faults


def test_a_server_killed_under_load_and_restarted_empty_comes_back(
    redis_server: Serve, open_on: Callable[..., RedisCache]
) -> None:
    server = redis_server()
    cache = open_on(server)
    stop = threading.Event()
    strangers: list[BaseException] = []

    def load(name: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                cache.set(f"{name}-{number}", entry())
                cache.get(f"{name}-{number}")
                if lease := cache.lease(f"{name}", 5):
                    cache.release(lease)
            except CacheError:
                time.sleep(0.001)
            except BaseException as exc:
                strangers.append(exc)
                return

    threads = [threading.Thread(target=load, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        eventually(lambda: cache.stats().writes > 50)
        server.kill()
        eventually(lambda: cache._line.open)
        server.start()
        eventually(lambda: not cache._line.open)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert strangers == []
    eventually(lambda: works(cache))
    assert cache.get("0-1") is None


def test_a_paused_server_is_left_alone_and_found_again(redis_server: Serve, open_on: Callable[..., RedisCache]) -> None:
    server = redis_server()
    cache = open_on(server)
    cache.set("k", entry())
    server.pause()
    with pytest.raises(CacheError, match="Timeout"):
        cache.get("k")
    with pytest.raises(CacheError, match="is unavailable"):
        cache.get("k")
    with pytest.raises(CacheError, match="is unavailable"):
        cache.set("k", entry())
    assert cache.stats().errors >= 3
    server.resume()
    eventually(lambda: works(cache))
    assert cache.get("k") == entry()


def test_no_server_at_all_raises_and_does_not_wait(redis_server: Serve, open_on: Callable[..., RedisCache]) -> None:
    server = redis_server()
    server.kill()
    cache = open_on(server)
    with pytest.raises(CacheError, match="refused"):
        cache.get("k")
    with pytest.raises(CacheError):
        cache.lease("k", 5)
    assert cache.stats().entries == 0
    server.start()
    eventually(lambda: works(cache))


@pytest.mark.parametrize("front", ["0", "1"])
def test_a_wrong_password_says_so_and_shows_none(redis_server: Serve, front: str) -> None:
    server = redis_server("--requirepass", "right")
    with open_redis(f"redis://:wrong-secret@127.0.0.1:{server.port}/0?front={front}") as cache:
        with pytest.raises(CacheError, match="password") as caught:
            cache.get("k")
        assert "wrong-secret" not in f"{caught.value}{cache.url}{cache!r}"
    with open_redis(f"redis://:right@127.0.0.1:{server.port}/0?front={front}") as cache:
        assert works(cache)


def test_a_full_server_refuses_writes_and_answers_reads(
    redis_server: Serve, open_on: Callable[..., RedisCache]
) -> None:
    server = redis_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    cache = open_on(server)
    cache.set("first", entry())
    numbers = iter(range(3000))

    def fill() -> None:
        for number in numbers:
            cache.set(f"k{number}", entry(text="x" * 20_000))

    with pytest.raises(CacheError, match="maxmemory-policy"):
        fill()
    assert cache.get("first") == entry()
    with pytest.raises(CacheError, match="is unavailable"):
        cache.set("more", entry())
    assert cache.get("first") == entry()
    server.command(b"CONFIG SET maxmemory 100mb")
    eventually(lambda: works(cache))


def test_a_read_only_replica_answers_reads_until_it_is_promoted(
    redis_server: Serve, open_on: Callable[..., RedisCache]
) -> None:
    primary = redis_server()
    replica = redis_server("--replicaof", "127.0.0.1", str(primary.port))
    open_on(primary).set("k", entry())
    cache = open_on(replica)
    eventually(lambda: cache.get("k") == entry())
    with pytest.raises(CacheError, match="read only replica"):
        cache.set("k2", entry())
    with pytest.raises(CacheError):
        cache.lease("k2", 5)
    assert cache.get("k") == entry()
    replica.command(b"REPLICAOF NO ONE")
    eventually(lambda: works(cache))


def test_a_token_grows_over_a_restart_that_lost_everything(
    redis_server: Serve, open_on: Callable[..., RedisCache]
) -> None:
    server = redis_server()
    cache = open_on(server)
    late = cache.lease("k", 600)
    assert late is not None
    server.kill()
    time.sleep(0.01)
    server.start()
    taken: list[Any] = []

    def take() -> bool:
        try:
            taken.append(cache.lease("k", 600))
        except CacheError:
            return False
        return taken[-1] is not None

    eventually(take)
    assert taken[-1].token > late.token
    cache.release(late)
    assert cache.lease("k", 600) is None


def _exceptions() -> list[type[Exception]]:
    exceptions = pytest.importorskip("redis").exceptions
    return [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", _exceptions())
def test_every_exception_of_the_redis_package_becomes_ours(kind: type[Exception]) -> None:
    exception = kind.__new__(kind, "it broke")
    with RedisCache("redis://localhost:1") as cache, pytest.raises(CacheError), cache._asking(write=True):
        raise exception


# Other kinds of server


@pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
def test_a_unix_socket(redis_server: Serve, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    redis_server("--unixsocket", str(path))
    with open_redis(f"unix://{path}?db=3&front=0") as cache:
        assert works(cache)


def test_a_cluster(redis_server: Serve) -> None:
    server = redis_server("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
    for first in range(0, 16384, 2048):
        slots = " ".join(str(slot) for slot in range(first, first + 2048))
        assert server.command(f"CLUSTER ADDSLOTS {slots}".encode()).startswith(b"+OK")
    eventually(lambda: b"cluster_state:ok" in server.command(b"CLUSTER INFO"))
    with open_redis(f"redis+cluster://127.0.0.1:{server.port}?front=0&rest=0.3") as cache:
        for number in range(300):
            cache.set(f"k{number}", entry(language="en" if number % 2 else "zh"), ttl=600)
        assert cache.clear(language="en") == 150
        assert len(list(cache.items())) == cache.stats().entries == 150
        lease = cache.lease("k", 60)
        assert lease is not None
        assert cache.lease("k", 60) is None
        waiter = threading.Thread(target=cache.wait, args=("k", 60))
        waiter.start()
        cache.release(lease)
        waiter.join(30)
        assert not waiter.is_alive()
        server.kill()
        with pytest.raises(CacheError):
            cache.get("k1")


def test_sentinels_lead_to_the_primary(redis_server: Serve) -> None:
    primary = redis_server()
    folder = primary.folder.parent / "sentinel"
    folder.mkdir()
    (folder / "sentinel.conf").write_text(f"sentinel monitor qvl-main 127.0.0.1 {primary.port} 1\n")
    sentinel = redis_server(str(folder / "sentinel.conf"), "--sentinel")
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/qvl-main/2?front=0&rest=0.3"
    with open_redis(url) as cache:
        eventually(lambda: works(cache))
        assert b"db2" in primary.command(b"INFO keyspace")
    with open_redis(url.replace("qvl-main", "another")) as cache, pytest.raises(CacheError, match="another"):
        cache.get("k")


INTERRUPTED = """
import random, signal, sys
from qvl.caches.base import CacheEntry
from qvl.caches.redis import RedisCache

def interrupt(*_):
    raise KeyboardInterrupt

cache = RedisCache(sys.argv[1])
for text in "abc":
    cache.set(text, CacheEntry(result={}, text=text))
signal.signal(signal.SIGALRM, interrupt)
for _ in range(800):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 2e-3))
        for _ in range(20):
            cache.get("a")
    except KeyboardInterrupt:
        pass
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
    for text in "bc":
        assert cache.get(text).text == text
print("all found")
"""


@pytest.mark.slow
def test_ctrl_c_in_the_midst_of_a_look_spoils_no_later_one(redis_server: Serve) -> None:
    command = [sys.executable, "-c", INTERRUPTED, redis_server().url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "all found", done.stderr[-2000:]
