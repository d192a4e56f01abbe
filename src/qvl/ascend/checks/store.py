"""Checks of the answer cache: a file system suitable for SQLite, an eviction policy suitable for Redis as a cache."""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote

from qvl.ascend.host import Host
from qvl.ascend.report import Finding
from qvl.config import in_home

NETWORK_TYPES: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "virtiofs"}
)
_VANISHING: Final = {"overlay": "container is removed", "tmpfs": "host restarts", "ramfs": "host restarts"}
_EVICTING: Final = frozenset({"allkeys-lru", "allkeys-lfu", "allkeys-random"})


def check(host: Host, url: str) -> Iterator[Finding]:
    """Yield findings about the cache URL `url` (as for `--cache`); `memory:` and `off` are skipped."""
    from qvl.caches.redis_url import SCHEMES

    scheme, separator, _ = url.partition(":")
    if url in ("off", "none") or scheme == "memory":
        yield Finding.skip("cache-store", f"cache {url.rstrip(':')} stores nothing outside the process")
    elif separator and scheme in SCHEMES:
        yield from _redis(url)
    elif scheme == "sqlite" or (not separator and ("/" in url or Path(url).suffix)):
        yield from _sqlite(host, file_of(url))
    else:
        yield Finding.fail(
            "cache-store",
            f"unknown kind of cache {scheme!r}",
            "write sqlite:////var/lib/qvl/cache.db, redis://host:6379/0, memory: or off",
        )


def file_of(url: str) -> str:
    """Return the absolute path of the file that a SQLite URL (`sqlite:///file.db`) or a plain path names."""
    from qvl.caches.sqlite import default_path

    path = url.partition("?")[0]
    if path.startswith("sqlite:"):
        path = unquote(path.partition("://")[2][1:])
    return str((in_home(path) if path else default_path()).absolute())


def mount_of(host: Host, path: str) -> tuple[str, str] | None:
    """Return (mount point, file system type) of an absolute path, from /proc/mounts; the longest mount point wins."""
    file = PurePosixPath(path)
    best: tuple[str, str] | None = None
    for line in (host.read("/proc/mounts") or "").splitlines():
        cells = line.split()
        if len(cells) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), cells[1])
        inside = point == "/" or file == PurePosixPath(point) or PurePosixPath(point) in file.parents
        # A later line with the same mount point lies on top of the earlier one.
        if inside and (best is None or len(point) >= len(best[0])):
            best = (point, cells[2])
    return best


def _sqlite(host: Host, path: str) -> Iterator[Finding]:
    folder = str(PurePosixPath(path).parent)
    mount = mount_of(host, path)
    kind = mount[1] if mount else "unknown"
    detail = {"file": path, "mount": mount[0] if mount else None, "type": kind}
    if kind in NETWORK_TYPES or kind.startswith("fuse."):
        yield Finding.fail(
            "cache-store",
            f"{path} lies on {kind}: SQLite's WAL needs shared memory and locks that network file systems lack",
            "put the file on a local disk, or share the answers through redis://",
            detail,
        )
        return
    if kind in _VANISHING:
        yield Finding.warn(
            "cache-store",
            f"{path} lies on {kind}: the answers are lost when the {_VANISHING[kind]}",
            "put the file on a volume or a disk",
            detail,
        )
    from qvl.caches.sqlite import default_path

    problem = _try_sqlite(host, folder, made=path == str(default_path().absolute()))
    if problem:
        yield Finding.fail(
            "cache-store",
            f"SQLite cannot work in {folder}: {problem}",
            f"create {folder} and make it writable for this user",
            detail,
        )
    elif kind not in _VANISHING:
        yield Finding.ok("cache-store", f"SQLite can write in {folder} ({kind})", detail)


def _try_sqlite(host: Host, folder: str, *, made: bool) -> str | None:
    nearest = host.path(folder)
    # The cache makes the folder of its default file alone; what must be writable then is the nearest one above.
    while made and not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest.name} is a file" if nearest.exists() else "the folder does not exist"
    file = nearest / f".qvl-doctor-{secrets.token_hex(8)}.db"
    try:
        with closing(sqlite3.connect(file, timeout=5)) as database:
            mode = database.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            database.execute("CREATE TABLE probe (value TEXT)")
            database.execute("INSERT INTO probe VALUES ('written')")
            database.commit()
            value = database.execute("SELECT value FROM probe").fetchone()[0]
        if mode != "wal" or value != "written":
            return f"journal mode is {mode}, expected wal"
    except sqlite3.Error as error:
        return str(error)
    finally:
        for suffix in ("", "-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
    return None


def _redis(url: str) -> Iterator[Finding]:
    from qvl.caches.redis_url import RedisAddress, import_redis
    from qvl.errors import ConfigError

    try:
        redis = import_redis()
        address = RedisAddress.parse(url, {"socket_timeout": 5.0, "connect_timeout": 5.0})
    except ConfigError as error:
        yield Finding.fail("cache-store", error.message, error.hint or "write redis://host:6379/0")
        return
    where = address.shown.partition("://")[2].partition("?")[0]
    try:
        with closing(address.connect()) as client:
            key = f"qvl:doctor:{secrets.token_hex(8)}"
            client.set(key, b"written", ex=60)
            kept, ttl = client.get(key), client.ttl(key)
            client.delete(key)
            facts = {**client.info("memory"), **client.info("server")}
    except (redis.RedisError, OSError) as error:
        yield Finding.fail(
            "cache-store",
            f"Redis at {where} does not work: {type(error).__name__}: {str(error).splitlines()[0]}",
            "check host, port and password of the URL, and that the server runs",
        )
        return
    if kept != b"written" or not 0 < ttl <= 60:
        yield Finding.fail(
            "cache-store",
            f"Redis at {where} does not return a written value",
            "give a database that this user may write",
            {"kept": repr(kept), "ttl": ttl},
        )
        return
    yield _policy(
        where,
        str(facts.get("redis_version", "?")),
        int(facts.get("maxmemory", 0)),
        str(facts.get("maxmemory_policy", "unknown")),
    )


def _policy(where: str, version: str, limit: int, policy: str) -> Finding:
    detail = {"version": version, "maxmemory": limit, "maxmemory_policy": policy}
    fix = "redis-cli CONFIG SET maxmemory 2gb; redis-cli CONFIG SET maxmemory-policy allkeys-lru (and in redis.conf)"
    if limit == 0:
        return Finding.warn("cache-store", f"Redis {version} at {where} has no memory limit", fix, detail)
    if policy in _EVICTING:
        return Finding.ok("cache-store", f"Redis {version} at {where}, {policy}, {limit // 2**20} MiB", detail)
    if policy == "noeviction":
        text = f"Redis at {where} evicts nothing: once it is full, no answer can be stored"
    else:
        text = f"Redis at {where} evicts by {policy}: answers stored without expiry are never evicted"
    return Finding.warn("cache-store", text, fix, detail)
