from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAST_MAJOR = "openai>=2.20,<3"


@pytest.fixture(autouse=True, scope="session")
def _own_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's settings and cache are neither read nor touched."""
    for name in list(os.environ):
        if name.startswith("QVL_") or name in ("DEVICE", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
            del os.environ[name]
    home = tmp_path_factory.mktemp("qvl-home")
    (home / "config.toml").write_text("")
    os.environ["QVL_CONFIG"] = str(home / "config.toml")
    os.environ["QVL_CACHE"] = f"sqlite:///{home / 'cache.db'}"


@pytest.fixture(scope="session")
def last_major() -> str:
    """A folder with the client's last major version, beside nothing else of this environment."""
    folder = ROOT / "build" / "openai2"
    if not (folder / "openai").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), LAST_MAJOR]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        if done.returncode:
            pytest.skip(f"{LAST_MAJOR} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return str(folder)
