"""What a Redis URL may say, and how a wrong one is refused."""

from __future__ import annotations

import re
import sys

import pytest

from qvl.caches.redis import RedisCache, open_redis
from qvl.caches.redis_url import RedisAddress
from qvl.errors import ConfigError, MissingDependencyError
from qvl.suggest import install_line


@pytest.mark.parametrize(
    ("url", "hosts", "db"),
    [
        ("redis:", (("localhost", 6379),), 0),
        ("redis://", (("localhost", 6379),), 0),
        ("redis://cache", (("cache", 6379),), 0),
        ("redis://cache:7000/4", (("cache", 7000),), 4),
        ("redis://cache:7000?db=4", (("cache", 7000),), 4),
        ("redis://[::1]:7000/1", (("::1", 7000),), 1),
        ("rediss://u:p%40ss@cache/0?ssl_cert_reqs=none", (("cache", 6379),), 0),
        ("redis+sentinel://a,b:26380/main/2", (("a", 26379), ("b", 26380)), 2),
        ("redis+cluster://a:1,b:2,c", (("a", 1), ("b", 2), ("c", 6379)), 0),
    ],
)
def test_urls_name_servers(url: str, hosts: tuple[tuple[str, int], ...], db: int) -> None:
    address = RedisAddress.parse(url, {})
    assert (address.hosts, address.db) == (hosts, db)


def test_credentials_are_unquoted_and_not_shown() -> None:
    address = RedisAddress.parse("redis://us%3Aer:p%40ss@cache:1/0", {})
    assert (address.arguments["username"], address.arguments["password"]) == ("us:er", "p@ss")
    assert "p@ss" not in repr(address)
    assert RedisCache("redis://u:secret@cache:1/0").url == "redis://cache:1/0"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis:/x", "redis://host"),
        ("redis://host:port/0", "invalid Redis port 'port'"),
        ("redis://host/zero", "invalid Redis database 'zero'"),
        ("redis://a,b/0", "invalid Redis URL"),
        ("redis://host/0?soket_timeout=1", "socket_timeout"),
        ("redis://host/0?socket_timeout=soon", "seconds"),
        ("redis://host/0?front=perhaps", "yes or no"),
        ("redis://host/0?front_ttl=0", "front_ttl"),
        ("redis://host/0?prefix=", "prefix"),
        ("redis+sentinel://host", "service"),
        ("redis+cluster://host/3", "databases"),
        ("unix://socket", "socket"),
        ("redis://user:secret@host:x/0", "invalid Redis port 'x'"),
    ],
)
def test_bad_urls_say_the_way_out(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        open_redis(url)
    assert "secret" not in str(caught.value)


def test_without_the_package_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_line("redis"))):
        open_redis("redis://localhost")
