"""Where this user's files lie, also for a user who has no home (a bare number in a container)."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """qvl's own folder for what can be made again; it need not exist."""
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("qvl")
    except RuntimeError:
        folder = Path()
    return folder if folder.is_absolute() else Path("/.cache/qvl")


def config_folder() -> Path:
    """qvl's own folder for settings; it need not exist."""
    from platformdirs import user_config_path

    try:
        folder = user_config_path("qvl")
    except RuntimeError:
        folder = Path()
    # The home of who has none is /, as docker sets it: nobody else can have put something there, as in /tmp.
    return folder if folder.is_absolute() else Path("/.config/qvl")


def in_home(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ resolved; as it is where that leads to nobody's home, which pathlib fails on."""
    return Path(os.path.expanduser(path))
