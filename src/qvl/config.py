"""Settings, by precedence: arguments, environment, config file, defaults.

The config file is TOML: `QVL_CONFIG` names it, else `config.toml` in the platform's configuration folder for qvl.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.types import JsonObject


class Settings(BaseSettings):
    """The settings of a Pipeline. Every field can be set as `QVL_<FIELD>` or in the config file.

    `cache` is a cache URL, a path of a SQLite file, or "off"; `cache_ttl` is in seconds. `serve` is the table of
    `qvl-serve`'s own options.
    """

    model_config = SettingsConfigDict(env_prefix="QVL_", extra="forbid", env_ignore_empty=True)

    model: str | None = None
    cache: str | None = None
    cache_mode: Literal["auto", "always", "off", "refresh"] = "auto"
    cache_ttl: float | None = None
    namespace: str = ""
    language: str = "en"
    max_pixels: int | None = None
    min_pixels: int | None = None
    concurrency: int = 8
    serve: dict[str, object] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_path())


def config_path() -> Path:
    """Return the path of the config file; it may be missing, unless `QVL_CONFIG` names it."""
    named = os.environ.get("QVL_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"QVL_CONFIG names {named!r}, which is not a file", hint="correct the path or unset it")
        return Path(named)
    return config_folder() / "config.toml"


def load(**arguments: object) -> Settings:
    """Return the merged settings; arguments that are None are ignored.

    Raises:
        ConfigError: an invalid value, or an unknown name in the config file.
    """
    values: JsonObject = {name: value for name, value in arguments.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown_setting(name, Settings.model_fields) from exc
        raise ConfigError(
            f"setting {name!r}: {first['msg']}", hint=f"argument, QVL_{name.upper()} or {config_path()}", param=name
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"{config_path()} is not valid TOML: {exc}") from exc


def unknown_setting(name: str, known: Iterable[str], table: str = "") -> ConfigError:
    """Return the error for a name in the config file, or in its `table`, that is not one of `known`."""
    from qvl.suggest import nearest

    where = f"[{table}] of {config_path()}" if table else str(config_path())
    return ConfigError(f"unknown setting {name!r} in {where}", hint=nearest(name, known), param=name)


def cache_folder() -> Path:
    """Return qvl's folder for caches; it may not exist yet."""
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("qvl")
    except RuntimeError:
        folder = Path()
    return folder if folder.is_absolute() else Path("/.cache/qvl")


def data_folder() -> Path:
    """Return qvl's folder for what is kept; it may not exist yet."""
    from platformdirs import user_data_path

    try:
        folder = user_data_path("qvl")
    except RuntimeError:
        folder = Path()
    return folder if folder.is_absolute() else Path("/.local/share/qvl")


def config_folder() -> Path:
    """Return qvl's folder for settings; it may not exist yet."""
    from platformdirs import user_config_path

    try:
        folder = user_config_path("qvl")
    except RuntimeError:
        folder = Path()
    # The home of who has none is /, as docker sets it: nobody else can have put something there, as in /tmp.
    return folder if folder.is_absolute() else Path("/.config/qvl")


def in_home(path: str | os.PathLike[str]) -> Path:
    """Return `path` with a leading ~ expanded; unchanged if that user has no home, where pathlib would raise."""
    return Path(os.path.expanduser(path))
