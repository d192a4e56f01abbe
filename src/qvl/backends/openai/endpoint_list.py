"""Reads a text file that lists the endpoints of a pool."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qvl.backends.openai.endpoint import OPENAI_URL, read_url, shown_url, split_urls
from qvl.errors import ConfigError

_HINT: Final = "http://host:8000/v1 weight=2 limit=16, one a line"


@dataclass(frozen=True, slots=True)
class Listed:
    """An endpoint in a list: `weight` is its share of the load, `limit` its most concurrent requests.

    Raises:
        ConfigError: the URL is invalid, or a number is out of range.
    """

    url: str
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", read_url(self.url))
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"the weight {self.weight} of {self.name} must be above 0", param="weights")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the limit {self.limit} of {self.name} must be at least 1", param="limit")

    @property
    def name(self) -> str:
        """Return the name of the endpoint in errors, logs and metrics: the URL without secrets."""
        return shown_url(self.url)


def listed_endpoints(base_url: str | Iterable[str | Listed] | None, limit: int | None) -> list[Listed]:
    """Return the endpoints of `base_url`, each with its weight and limit; None: of the environment, or OpenAI's own."""
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if isinstance(base_url, str):
        base_url = split_urls(base_url)
    listed = [one if isinstance(one, Listed) else Listed(one) for one in base_url]
    return [replace(one, limit=one.limit or limit) for one in listed]


def by_name(listed: Iterable[Listed]) -> dict[str, Listed]:
    """Return the endpoints by name.

    Raises:
        ConfigError: the list is empty, or has duplicates.
    """
    endpoints: dict[str, Listed] = {}
    for one in listed:
        if one.name in endpoints:
            raise ConfigError(f"duplicate endpoint {one.name}", param="base_url")
        endpoints[one.name] = one
    if not endpoints:
        raise ConfigError("base_url is empty", hint="such as http://host:8000/v1", param="base_url")
    return endpoints


def read_endpoint_list(path: str | Path) -> list[Listed]:
    """Return the endpoints in a file: a URL a line, optionally `weight=` and `limit=`; `#` starts a comment.

    Raises:
        ConfigError: the file cannot be read, is empty, or has an invalid or duplicate line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"the endpoint list {path} cannot be read: {reason}", hint=_HINT) from exc
    endpoints = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            endpoints.append(_listed(*words))
        except (ConfigError, ValueError) as exc:
            reason = exc.message if isinstance(exc, ConfigError) else str(exc)
            raise ConfigError(f"{path}, line {number}: {reason}", hint=_HINT, param="base_url") from exc
    try:
        by_name(endpoints)
    except ConfigError as exc:
        raise ConfigError(f"the endpoint list {path}: {exc.message}", hint=_HINT, param="base_url") from exc
    return endpoints


def _listed(url: str, *options: str) -> Listed:
    weight, limit = 1.0, None
    for option in options:
        name, _, value = option.partition("=")
        if name == "weight":
            weight = float(value)
        elif name == "limit":
            limit = int(value)
        else:
            raise ValueError(f"unknown option {option!r}: expected weight= or limit=")
    return Listed(url, weight, limit)
