"""When an answer may come from the cache, and how old it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from qvl.errors import ConfigError

CacheMode: TypeAlias = Literal["auto", "always", "off", "refresh"]
CACHE_MODES: Final = ("auto", "always", "off", "refresh")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """The use that one request may make of the cache. `max_age` is in seconds: an older entry counts as a miss."""

    read: bool = True
    write: bool = True
    max_age: float | None = None

    @classmethod
    def of(cls, mode: CacheMode, *, deterministic: bool) -> CachePolicy:
        """`auto` keeps what must be the same again, `refresh` asks anew and stores.

        Raises:
            ConfigError: an unknown mode.
        """
        if mode not in CACHE_MODES:
            raise ConfigError(f"unknown cache mode {mode!r}", hint=f"one of {', '.join(CACHE_MODES)}", param="cache")
        if mode == "off" or (mode == "auto" and not deterministic):
            return cls(read=False, write=False)
        return cls(read=mode != "refresh")

    @property
    def used(self) -> bool:
        return self.read or self.write
