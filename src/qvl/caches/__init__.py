"""Caches: each keeps finished answers under a key."""

from __future__ import annotations

import os
from pathlib import Path

from qvl.caches.urls import path_url


def default_url() -> str:
    """The URL of the cache that is used when none is named: `QVL_CACHE`, else the default SQLite file.

    `QVL_CACHE` is a URL, the path of a file, the path of an existing folder (the file is `cache.db` in it), or `off`.
    """
    value = os.environ.get("QVL_CACHE", "").strip()
    if not value:
        return "sqlite://"
    if value.lower() in {"off", "auto", "memory"} or "://" in value or value.startswith("memory:"):
        return {"auto": "sqlite://", "memory": "memory:"}.get(value.lower(), value)
    path = Path(value).expanduser()
    return path_url(str(path / "cache.db" if path.is_dir() else path))
