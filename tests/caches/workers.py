"""What the child processes of the cache tests do: `python workers.py TASK URL ARGUMENTS`."""

from __future__ import annotations

import os
import sys
import time

from qvl.caches.base import Cache
from qvl.testing.cache_contract import entry


def open_cache(url: str) -> Cache:
    if url.startswith("sqlite"):
        from qvl.caches.sqlite import SqliteCache

        return SqliteCache.from_url(url)
    from qvl.caches.redis import open_redis

    return open_redis(url)


def write(cache: Cache, name: str, number: str) -> None:
    """Writes `number` entries of its own."""
    for index in range(int(number)):
        cache.set(f"{name}-{index}", entry(text=f"{name}-{index}"))


def single_flight(cache: Cache, log: str, name: str) -> None:
    """Asks for one key as the pipeline does; appends its name to `log` when it was the one to compute."""
    while cache.get("k") is None:
        lease = cache.lease("k", 30)
        if lease is None:
            cache.wait("k", 5)
            continue
        if cache.get("k") is None:
            with open(log, "a") as file:
                file.write(f"{name}\n")
            time.sleep(0.05)
            cache.set("k", entry())
        cache.release(lease)


def hold(cache: Cache, seconds: str) -> None:
    """Takes the lease, says so, and never gives it back."""
    assert cache.lease("k", float(seconds)) is not None
    print("held", flush=True)
    sys.stdin.read()


def read_then_write(cache: Cache) -> None:
    """Prints what reading finds and how writing fails."""
    found = cache.get("k")
    print("read", found.text if found else None, flush=True)
    try:
        cache.set("new", entry())
        print("written", flush=True)
    except Exception as exc:
        print(type(exc).__name__, exc, flush=True)
    print("still", cache.get("k") is not None, flush=True)


def fill(cache: Cache, limit: str) -> None:
    """Writes under a limit on the size of files until it is refused, then reads on."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    failure: Exception | None = None
    for index in range(10_000):
        try:
            cache.set(f"k{index}", entry(text="x" * 5000))
        except Exception as exc:
            failure = exc
            break
    print(type(failure).__name__, cache.get("k0") is not None, flush=True)


def become(user: str) -> None:
    if user != "-":
        os.setgid(int(user))
        os.setuid(int(user))


if __name__ == "__main__":
    task, user, url, *arguments = sys.argv[1:]
    imported = open_cache(url)
    become(user)
    with imported as opened:
        globals()[task](opened, *arguments)
