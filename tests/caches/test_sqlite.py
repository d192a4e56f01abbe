"""What only the SQLite cache promises: many processes, bad files, full disks, columns to query."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvl.caches.base import Lease
from qvl.caches.sqlite import SqliteCache, default_path
from qvl.errors import CacheError, ConfigError
from qvl.testing.cache_contract import entry

from .conftest import Start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def cache(path: Path) -> Iterator[SqliteCache]:
    with contextlib.closing(SqliteCache(path)) as opened:
        yield opened


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


# Many processes


@pytest.mark.slow
def test_processes_lose_no_write(path: Path, start: Start) -> None:
    _processes_lose_no_write(path, start, 300)


@pytest.mark.slow
def test_processes_lose_none_of_80_000_writes(path: Path, start: Start) -> None:
    _processes_lose_no_write(path, start, 10_000)


def _processes_lose_no_write(path: Path, start: Start, number: int) -> None:
    writers = [start("write", f"sqlite:///{path}", f"w{index}", number) for index in range(8)]
    assert [writer.wait(280) for writer in writers] == [0] * 8
    assert rows(path, "SELECT count(*), count(DISTINCT key) FROM entries") == [(8 * number, 8 * number)]
    assert rows(path, "SELECT entries, bytes FROM totals") == rows(path, "SELECT count(*), sum(size) FROM entries")
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
def test_of_sixteen_processes_one_computes(path: Path, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "computed"
    askers = [start("single_flight", f"sqlite:///{path}", log, index) for index in range(16)]
    assert [asker.wait(120) for asker in askers] == [0] * 16
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_holder_loses_its_lease_by_time(path: Path, cache: SqliteCache, start: Start) -> None:
    holder = start("hold", cache.url, 60.0)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert cache.lease("k", 60) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    # By this clock a second is left of it at most, however slow the machine is.
    with SqliteCache(path, clock=lambda: time.time() + 59) as later:
        later.wait("k", 60)
        taken = later.lease("k", 60)
    assert taken is not None
    assert taken.token == 2


def test_a_release_between_the_look_and_the_sleep_is_not_missed(path: Path) -> None:
    looks: list[Lease] = []

    def clock() -> float:
        # Asked once for the look at the entry and once for how long to sleep: between them the holder ends.
        if looks and threading.current_thread() is not threading.main_thread():
            looks.append(looks[0])
            if len(looks) == 3:
                cache.release(looks[0])
        return time.time()

    with SqliteCache(path, clock=clock) as cache, ThreadPoolExecutor(1) as pool:
        lease = cache.lease("k", 600)
        assert lease is not None
        looks.append(lease)
        pool.submit(cache.wait, "k", 60).result(20)
        assert len(looks) >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_parent_and_forked_child_both_go_on(cache: SqliteCache, path: Path) -> None:
    cache.set("before", entry())
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for index in range(50):
                    cache.set(f"child-{number}-{index}", entry())
                cache.close()
                code = 0 if cache.get("before") == entry() else 2
            finally:
                os._exit(code)
        children.append(child)
        cache.set(f"parent-{number}", entry())
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert cache.stats().entries == 1 + 4 + 4 * 50
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


# Room


def test_the_least_recently_used_entry_goes_first(path: Path) -> None:
    with SqliteCache(path, max_bytes=60_000) as cache:
        for number in range(4):
            cache.set(f"k{number}", entry(text="x" * 4000))
        cache.get("k0")
        for number in range(4, 7):
            cache.set(f"k{number}", entry(text="x" * 4000))
        kept = {key for key, _ in cache.items()}
        assert "k0" in kept
        assert "k6" in kept
        assert "k1" not in kept
        stats = cache.stats()
        assert stats.size_bytes <= 60_000
        assert stats.evictions == 7 - stats.entries > 0


def test_expired_entries_go_before_live_ones(path: Path) -> None:
    now = [1000.0]
    with SqliteCache(path, max_bytes=60_000, clock=lambda: now[0]) as cache:
        cache.set("live", entry(text="x" * 8000))
        cache.set("dead", entry(text="x" * 8000), ttl=10)
        now[0] += 11
        cache.set("new", entry(text="x" * 8000))
        cache.set("newer", entry(text="x" * 2000))
        assert {key for key, _ in cache.items()} == {"live", "new", "newer"}
        assert cache.stats().evictions == 0


def test_the_file_stays_near_its_bound_and_shrinks_when_cleared(path: Path) -> None:
    with SqliteCache(path, max_bytes=500_000) as cache:
        for number in range(600):
            cache.set(f"k{number}", entry(text="x" * 2000))
        cache.close()
        assert path.stat().st_size < 1_500_000
        cache.clear()
        cache.close()
        assert path.stat().st_size < 200_000


def test_an_entry_larger_than_the_cache_is_refused_and_evicts_nothing(path: Path) -> None:
    with SqliteCache(path, max_bytes=20_000) as cache:
        cache.set("small", entry())
        with pytest.raises(CacheError, match="raise max_bytes"):
            cache.set("big", entry(text="x" * 30_000))
        assert cache.get("small") is not None


# Bad files


def test_a_file_that_is_no_database_is_set_aside_with_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"this is a shopping list" * 1000)
    with SqliteCache(path) as cache:
        assert cache.get("k") is None
        cache.set("k", entry())
        assert cache.get("k") == entry()
    (kept,) = path.parent.glob("cache.db.corrupt-*")
    assert kept.read_bytes().startswith(b"this is a shopping list")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "corrupt cache file renamed" in record.getMessage()


def test_a_file_that_breaks_in_mid_run_is_set_aside(path: Path) -> None:
    with SqliteCache(path) as first:
        for number in range(200):
            first.set(f"k{number}", entry(text="x" * 2000))
    with SqliteCache(path) as cache:
        assert cache.get("k7") is not None
        pages = path.stat().st_size // 4096
        with path.open("r+b") as file:
            for page in range(1, pages):
                file.seek(page * 4096)
                file.write(os.urandom(4096))
        for number in range(200):
            cache.get(f"k{number}")
            cache.set(f"k{number}", entry())
            assert cache.get(f"k{number}") == entry()
        assert cache.stats().entries > 0
    assert list(path.parent.glob("cache.db.corrupt-*"))
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
def test_processes_that_meet_a_corrupt_file_together_begin_one_new_file(path: Path, start: Start) -> None:
    path.write_bytes(b"not a database, however long one looks at it" * 500)
    writers = [start("write", f"sqlite:///{path}", f"w{index}", 50) for index in range(6)]
    assert [writer.wait(120) for writer in writers] == [0] * 6
    assert (
        len([kept for kept in path.parent.glob("cache.db.corrupt-*") if kept.suffix[-4:] not in ("-wal", "-shm")]) == 1
    )
    assert rows(path, "SELECT count(*) FROM entries") == [(300,)]


def test_a_file_deleted_in_mid_run_is_begun_again(cache: SqliteCache, path: Path) -> None:
    cache.set("k", entry())
    path.unlink()
    assert cache.get("k") is None
    cache.set("k", entry())
    assert rows(path, "SELECT count(*) FROM entries") == [(1,)]


def test_tables_dropped_by_hand_are_made_again(cache: SqliteCache, path: Path) -> None:
    cache.set("k", entry())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE entries")
    assert cache.get("k") is None
    cache.set("k", entry())
    assert cache.stats().entries == 1


def test_an_entry_of_another_version_is_a_miss(cache: SqliteCache, path: Path) -> None:
    cache.set("k", entry())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("""UPDATE entries SET entry = '{"v": 99, "shape": "unknown"}'""")
    assert cache.get("k") is None
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.errors) == (0, 1, 1)


# Stores that cannot be written


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("folder", [0o555, 0o777])
def test_a_read_only_file_is_read_and_writing_raises(path: Path, start: Start, folder: int) -> None:
    with SqliteCache(path) as cache:
        cache.set("k", entry())
    path.chmod(0o444)
    path.parent.chmod(folder)
    reader = start("read_then_write", f"sqlite:///{path}", user=_other_user(path))
    try:
        out, _ = reader.communicate(timeout=60)
    finally:
        path.parent.chmod(0o755)
    assert out.splitlines()[0] == f"read {entry().text}"
    assert out.splitlines()[1].startswith("CacheError")
    assert out.splitlines()[2] == "still True"


def _other_user(path: Path) -> int | None:
    """The permissions of files bind anyone but root, whose tests run a child as nobody."""
    if os.geteuid() != 0:
        return None
    for folder in path.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    return 65534


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_makes_writes_fail_and_reads_go_on(path: Path, start: Start) -> None:
    writer = start("fill", f"sqlite:///{path}", 400_000)
    out, _ = writer.communicate(timeout=60)
    assert out == "CacheError True\n"
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_path_that_is_a_folder_raises_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "cache.db").mkdir()
    with SqliteCache(tmp_path / "cache.db") as cache, pytest.raises(CacheError, match="unable to open"):
        cache.get("k")
    assert cache._tally.stats(entries=0, size_bytes=0).errors == 1


def test_a_file_kept_locked_raises_after_the_busy_timeout_while_reads_go_on(path: Path) -> None:
    with SqliteCache(path, busy_timeout=0.05) as cache:
        cache.set("k", entry())
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(CacheError, match="busy_timeout"):
                cache.set("k2", entry())
            assert cache.get("k") is not None
        cache.set("k2", entry())


# For people


def test_a_person_can_query_the_columns(cache: SqliteCache, path: Path) -> None:
    cache.set("k", entry(), ttl=60)
    columns = (
        "key, image_hash, task, language, model, namespace, text, brand, category, prompt_tokens, completion_tokens"
    )
    (found,) = rows(
        path, f"SELECT {columns} FROM entries WHERE json_extract(entry, '$.analysis.attributes.colour') = 'red'"
    )
    wanted = entry()
    assert found == ("k", wanted.image_hash, "analyze", "zh", "tiny", "shop", wanted.text, "Acme", "shoe", 30, 12)
    ((created, expires, used),) = rows(path, "SELECT created_at, expires_at, last_used_at FROM entries")
    assert created == wanted.created_at
    assert abs(float(str(expires)) - time.time() - 60) < 30
    assert abs(float(str(used)) - time.time()) < 30
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_an_analysis_of_another_schema_has_no_brand(cache: SqliteCache, path: Path) -> None:
    cache.set("k", entry(analysis={"total": 12.5, "brand": ["not", "text"]}))
    assert rows(path, "SELECT brand, category FROM entries") == [(None, None)]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a/b.db", "a/b.db"),
        ("sqlite:///FOLDER/b%20c.db?max_bytes=1MiB", "FOLDER/b c.db"),
        ("sqlite:///~/x.db", "~/x.db"),
    ],
)
def test_urls_name_files(url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    url, path = url.replace("FOLDER", str(tmp_path)), path.replace("FOLDER", str(tmp_path))
    cache = SqliteCache.from_url(url)
    assert cache.path == Path(path).expanduser().absolute()
    assert SqliteCache.from_url(cache.url).path == cache.path


def test_the_bare_url_is_the_default_file() -> None:
    assert SqliteCache.from_url("sqlite://").path == default_path().absolute()
    assert SqliteCache.from_url("sqlite:").path == default_path().absolute()


def test_url_options_are_typed() -> None:
    cache = SqliteCache.from_url("sqlite:///x.db?max_bytes=1.5MiB&busy_timeout=2s")
    assert (cache.max_bytes, cache._file.busy_timeout) == (1_572_864, 2.0)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://x.db", "sqlite:///x.db"),
        ("sqlite:///:memory:", "memory:"),
        ("sqlite:///x.db?max_byte=1", "busy_timeout, max_bytes"),
        ("sqlite:///x.db?max_bytes=much", "512MiB"),
        ("sqlite:///x.db?busy_timeout=soon", "seconds"),
        ("sqlite:///x.db?max_bytes=0", "above 0"),
        ("mysql://x", "sqlite:///"),
    ],
)
def test_bad_urls_say_the_way_out(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        SqliteCache.from_url(url)


def test_a_file_in_no_folder_is_refused_and_no_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "answres" / "today", tmp_path / "file"):
        with pytest.raises(ConfigError, match=f"does not exist .mkdir -p {folder},"):
            SqliteCache(folder / "a.db")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_the_folder_of_the_default_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "caches" / name)
    with SqliteCache() as cache:
        cache.set("k", entry())
    assert (tmp_path / "caches" / "qvl" / "cache.db").is_file()


def test_a_file_that_was_never_a_cache_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("id,price\n1,2\n")
    with pytest.raises(ConfigError, match=r"prices\.csv is not a cache file"):
        SqliteCache(prices)
    assert [file.name for file in tmp_path.iterdir()] == ["prices.csv"]
    assert prices.read_text() == "id,price\n1,2\n"
