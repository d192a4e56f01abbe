"""Opens the cache that a URL, a path or a setting names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import cast

from qvl.caches.base import Cache
from qvl.caches.urls import path_url
from qvl.config import in_home
from qvl.errors import ConfigError, UnknownNameError
from qvl.plugins.host import Registry
from qvl.suggest import nearest


def cache_named(cache: object) -> str | None:
    """Return `cache`, the URL, path or "off" passed by a user, or None for the default.

    Raises:
        ConfigError: it is neither a string nor None, such as `False`.
    """
    if cache is None or isinstance(cache, str):
        return cache
    hint = "write str(path)" if isinstance(cache, Path) else 'write cache="off" for none'
    raise ConfigError(f"invalid cache={cache!r}", hint=hint, param="cache")


def open_cache(url: str | None, registry: Registry) -> Cache | None:
    """Return the cache at `url`, a URL or the path of a SQLite file, by default qvl's own file; None for "off".

    Raises:
        UnknownNameError: the scheme is unknown.
        ConfigError: the URL is malformed.
        CacheError: the store cannot be opened.
    """
    if url is None:
        url = "sqlite://"
    if url in ("off", "off:", "none"):
        return None
    scheme, colon, _ = url.partition(":")
    if not colon or len(scheme) == 1 or scheme.startswith((".", "~")) or "/" in scheme:
        if url in registry.factories:
            return cast("Cache", registry.build(url, f"{url}:"))
        if not Path(url).suffix and "/" not in url and "\\" not in url:
            near = nearest(url, registry.factories)
            raise UnknownNameError(f"unknown cache {url!r}", hint=f"{near}; a path such as answers.db, or off")
        _refuse_a_scheme_without_colon(url, registry)
        return cast("Cache", registry.build("sqlite", path_url(str(in_home(url).absolute()))))
    return cast("Cache", registry.build(scheme, url))


def _refuse_a_scheme_without_colon(path: str, registry: Registry) -> None:
    """Raise ConfigError for a misspelt URL such as `redis//host`, unless a folder of that name exists."""
    word, slashes, rest = path.partition("//")
    if not slashes or not word or Path(word).exists():
        return
    if close := difflib.get_close_matches(word, registry.factories, n=1, cutoff=0.7):
        # What stands before an @ is a password.
        shown = rest.rpartition("@")[2]
        hint = f"did you mean {close[0]}://{shown}?"
        raise ConfigError(f"missing colon in {word}//{shown}", hint=hint, param="cache")
