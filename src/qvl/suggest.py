"""Hints for errors: the nearest known name, and the command that installs an extra."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name closest to `name`, else with all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def install_line(*extras: str) -> str:
    """Return the pip command that installs `extras`: from the clone if qvl was installed from one, else by name."""
    bracket = f"[{','.join(extras)}]"
    folder = _source()
    if folder is None:
        return f"{_pip()} install 'qvl{bracket}'"
    where = "." if folder == Path.cwd() else str(folder)
    # An editable installation stays one.
    editable = "-e " if (folder / "src" / "qvl").resolve() == Path(__file__).resolve().parent else ""
    return f"{_pip()} install {editable}'{where}{bracket}'"


def _source() -> Path | None:
    """Return the clone that this installation was made from, if it still exists."""
    root = Path(__file__).resolve().parents[2]
    if root.name != "site-packages" and (root / "pyproject.toml").is_file():
        return root
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        origin = json.loads(distribution("qvl").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    folder = Path(url2pathname(urlsplit(origin.get("url", "")).path))
    return folder if "dir_info" in origin and (folder / "pyproject.toml").is_file() else None


def _pip() -> str:
    """Return the pip command of this environment, which may not be the one on the PATH."""
    beside = Path(sys.executable).parent
    if Path(shutil.which("pip") or beside / "pip").parent == beside:
        return "pip"
    try:
        python = os.path.relpath(sys.executable)
    except ValueError:  # on another drive
        python = sys.executable
    return f"{shlex.quote(sys.executable if python.startswith('..') else python)} -m pip"
