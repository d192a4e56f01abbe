"""The backend and the cache of a pipeline, made from their names."""

from __future__ import annotations

from typing import Final, cast

from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.caches.open import open_cache
from qvl.errors import CacheError, ConfigError
from qvl.log import logger
from qvl.plugins.host import PluginHost
from qvl.plugins.names import split_model
from qvl.types import JsonMapping

log = logger("qvl.pipeline")
BUNDLED: Final = "bundled"
"""The name of the model that comes with qvl, for those who want it by name: `local:bundled`, `vllm:bundled`."""
_HAVE_BUNDLED: Final = ("local", "vllm")


def make_backend(host: PluginHost, model: str | None, backend: Backend | None, options: JsonMapping) -> Backend:
    """Return `backend`, or the one that `model` names, with its `options`; None and BUNDLED are the bundled model's.

    Raises:
        ConfigError: an unknown name or option.
    """
    if backend is not None:
        if options:
            raise ConfigError(
                f"option {next(iter(options))!r} has no effect on a backend instance", hint="give it to the backend"
            )
        return backend
    if model is None:
        return cast("Backend", host.backends.build("local", None, **options))
    name, rest = split_model(model, host.backends.factories)
    own = rest == BUNDLED and name in _HAVE_BUNDLED
    return cast("Backend", host.backends.build(name, None if own else rest, **options))


def make_cache(host: PluginHost, url: str | None) -> Cache | None:
    """Return the cache at `url`; None, after a warning, if it cannot be opened."""
    try:
        return open_cache(url, host.caches)
    except CacheError as exc:
        log.warning("cache cannot be opened, continuing without it", error=str(exc))
        return None
