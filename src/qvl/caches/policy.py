"""The rules by which a request reads and writes the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from qvl.errors import ConfigError

CacheMode: TypeAlias = Literal["auto", "always", "off", "refresh"]
CACHE_MODES: Final = ("auto", "always", "off", "refresh")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Permissions of one request on the cache. `max_age` is in seconds: an older entry counts as a miss."""

    read: bool = True
    write: bool = True
    max_age: float | None = None

    @classmethod
    def of(cls, mode: CacheMode, *, deterministic: bool) -> CachePolicy:
        """Return the policy of a mode: `auto` uses the cache for deterministic requests, `refresh` only writes it.

        Raises:
            ConfigError: an unknown mode.
        """
        if mode not in CACHE_MODES:
            raise ConfigError(f"unknown cache mode {mode!r}", hint=f"one of {', '.join(CACHE_MODES)}", param="cache")
        if mode == "off" or (mode == "auto" and not deterministic):
            return UNCACHED
        return cls(read=mode != "refresh")

    @property
    def used(self) -> bool:
        return self.read or self.write


UNCACHED: Final = CachePolicy(read=False, write=False)
