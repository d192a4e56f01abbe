"""Parses Redis URLs (server, TLS, socket, sentinels, cluster) and makes redis-py clients of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from qvl.caches.urls import Reader, count, flag, read_options, seconds
from qvl.errors import ConfigError, MissingDependencyError
from qvl.suggest import install_line
from qvl.types import JsonMapping, JsonObject

SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")
DEFAULT_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

# The options of the cache itself; all others of OPTIONS go to redis-py under their own names.
OWN: Final = frozenset({"prefix", "rest", "front", "front_ttl", "connect_timeout", "sentinel_password", "db", "ssl"})
OPTIONS: Final[Mapping[str, Reader]] = {
    "client_name": str,
    "connect_timeout": seconds,
    "db": count,
    "front": flag,
    "front_ttl": seconds,
    "health_check_interval": count,
    "max_connections": count,
    "password": str,
    "prefix": str,
    "protocol": count,
    "rest": seconds,
    "sentinel_password": str,
    "socket_timeout": seconds,
    "ssl": flag,
    "ssl_ca_certs": str,
    "ssl_cert_reqs": str,
    "ssl_certfile": str,
    "ssl_check_hostname": flag,
    "ssl_keyfile": str,
    "username": str,
}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Address and connection options of a Redis. `shown` is the URL without its password, for messages."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    db: int
    service: str
    shown: str
    own: JsonMapping = field(default_factory=dict)
    arguments: JsonMapping = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str, named: JsonMapping) -> RedisAddress:
        """Return the address in `url`, of one of SCHEMES; `named` are OPTIONS by name, which override those in `url`.

        Raises:
            ConfigError: another scheme, an unknown option, a port or database that is not a number.
        """
        base, _, query = url.partition("?")
        scheme, separator, rest = base.partition("://") if base != "redis:" else ("redis", "://", "")
        if scheme not in SCHEMES or not separator:
            raise ConfigError(f"invalid Redis URL {_shown(base)}", hint="write redis://host:6379/0")
        options = read_options("redis", query, named, OPTIONS, passed=("clock",))
        credentials, at, location = rest.rpartition("@")
        if at:
            user, colon, password = credentials.partition(":")
            options = {"username": unquote(user) or None, **options}
            if colon:
                options = {"password": unquote(password), **options}
        db = options.get("db", 0)
        hosts: tuple[tuple[str, int], ...] = ()
        path = service = ""
        if scheme == "unix":
            path = unquote(location)
            if not path.startswith("/"):
                raise ConfigError(f"missing socket path in {_shown(base)}", hint="write unix:///path/to/redis.sock")
        else:
            where, _, tail = location.partition("/")
            port = SENTINEL_PORT if scheme == "redis+sentinel" else DEFAULT_PORT
            hosts = tuple(_host(part, port) for part in (where or "localhost").split(","))
            parts = [unquote(part) for part in tail.split("/") if part]
            if scheme == "redis+sentinel":
                if not parts:
                    raise ConfigError(
                        f"{_shown(base)} names no service", hint="write redis+sentinel://host:26379/service/0"
                    )
                service = parts.pop(0)
            if parts:
                db = _number(parts.pop(0), "database")
            if parts or (scheme in {"redis", "rediss"} and len(hosts) > 1):
                raise ConfigError(f"invalid Redis URL: {_shown(base)}", hint="write redis://host:6379/0")
            if scheme == "redis+cluster" and db:
                raise ConfigError("Redis clusters have no databases", hint="leave out the number at the URL's end")
        own = {name: value for name, value in options.items() if name in OWN}
        arguments = {name: value for name, value in options.items() if name not in OWN and value is not None}
        return cls(scheme, hosts, path, db, service, _shown(base), own, arguments)

    def connect(self) -> Any:
        """Return a redis-py client for this address. It connects on first use, but a client of a cluster at once."""
        redis = import_redis()
        retry = importlib.import_module("redis.retry").Retry
        at_once = importlib.import_module("redis.backoff").NoBackoff()

        arguments: JsonObject = {
            "socket_timeout": 0.5,
            "socket_connect_timeout": self.own.get("connect_timeout", 0.5),
            "max_connections": 64,
            # One retry at once, for a pooled connection that a restarted server has forgotten.
            "retry": retry(at_once, 1, supported_errors=(redis.ConnectionError,)),
            **self.arguments,
        }
        if self.scheme == "rediss" or self.own.get("ssl"):
            arguments["ssl"] = True
        if self.scheme == "unix":
            return redis.Redis(unix_socket_path=self.path, db=self.db, **arguments)
        if self.scheme == "redis+sentinel":
            timeouts = {name: arguments[name] for name in ("socket_timeout", "socket_connect_timeout")}
            secret = {"password": self.own["sentinel_password"]} if "sentinel_password" in self.own else {}
            sentinel = redis.Sentinel(list(self.hosts), sentinel_kwargs={**timeouts, **secret}, **arguments)
            return sentinel.master_for(self.service, db=self.db)
        if self.scheme == "redis+cluster":
            node = importlib.import_module("redis.cluster").ClusterNode
            nodes = [node(host, port) for host, port in self.hosts]
            arguments["retry"] = retry(at_once, 1)
            return redis.RedisCluster(startup_nodes=nodes, **arguments)
        ((host, port),) = self.hosts
        return redis.Redis(host=host, port=port, db=self.db, **arguments)


def import_redis() -> Any:
    """Return the package redis, imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import redis
    except ImportError as exc:
        raise MissingDependencyError("the redis cache needs the package redis", hint=install_line("redis")) from exc
    return redis


def _host(text: str, port: int) -> tuple[str, int]:
    """Return (host, port) of `host`, `host:port`, `[v6]` or `[v6]:port`; `port` is the default."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, _number(rest[1:], "port") if rest.startswith(":") else port
    host, colon, port_text = text.partition(":")
    return host or "localhost", _number(port_text, "port") if colon else port


def _number(text: str, what: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"invalid Redis {what} {text!r}", hint="write redis://host:6379/0")
    return int(text)


def _shown(base: str) -> str:
    scheme, separator, rest = base.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
