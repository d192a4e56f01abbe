from __future__ import annotations

import os

import pytest


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
