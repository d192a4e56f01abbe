"""Pictures that killed engines: one that did it twice is refused, instead of being tried on the next one."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from qvl.errors import MediaError
from qvl.log import logger
from qvl.types import ChatRequest

STRIKES: Final = 2
SECONDS: Final = 3600.0
MOST: Final = 256
log = logger("qvl.backends")


class Quarantine:
    """Counts which pictures were being answered when an engine died.

    All pictures of a request count together. Whoever was there at a death is a suspect: callers send suspects to an
    engine one at a time, so that a second death has one cause. An answer clears them.

    Args:
        file: keeps the quarantined pictures over restarts and for all processes that name it, as a JSON object of
            `sha256:…` (several joined by a space) and the time until when; what is deleted from it is released. Strikes
            are counted in each process. None: in memory.
        seconds: how long a picture is refused, and how long a suspicion lasts.
        most: most pictures in quarantine, and most suspects; the oldest are forgotten.
        on: False counts and refuses nothing.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        seconds: float = SECONDS,
        most: int = MOST,
        on: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = None if file is None else Path(file)
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._on = on
        self._suspects: OrderedDict[str, float] = OrderedDict()
        self._held: OrderedDict[str, float] = OrderedDict()
        self._read_at: tuple[int, int] | None = None
        self.refused = 0
        # The engines at which suspects run, one at each.
        self.trying: set[str] = set()
        self._tried = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of pictures in quarantine."""
        self._refresh()
        return len(self._held)

    def watches(self) -> bool:
        """Return True if there are pictures in quarantine or suspects, so that hashes matter."""
        self._refresh()
        return bool(self._held or self._suspects)

    def refuse(self, request: ChatRequest) -> None:
        """Check that no picture of the request is in quarantine.

        Raises:
            MediaError: one is; it names the picture.
        """
        if not request.pictures:
            return
        self._refresh()
        if not self._held:
            return
        hashes = [picture.sha256 for picture in request.pictures]
        for key, until in self._held.items():
            names = key.split(" ")
            if until > self._clock() and set(names) <= set(hashes):
                self.refused += 1
                error = MediaError(
                    f"the picture {names[0][:23]}… is in quarantine: {STRIKES} engines died while they answered it",
                    hint=f"send another one; it is tried again after {max(1, round((until - self._clock()) / 60))} min,"
                    " or once the operator releases it (kill -HUP)",
                    code="image_quarantined",
                )
                error.picture = hashes.index(names[0])
                raise error

    def suspects(self, request: ChatRequest) -> bool:
        """Return True if an engine died with this request's pictures, and no other one has answered them since."""
        if not request.pictures or not self._suspects:
            return False
        return self._suspects.get(_key(request), 0.0) > self._clock()

    def killed(self, request: ChatRequest, engine: str, *, suspect: bool) -> None:
        """Record that `engine` died while it answered the request; `suspect`: as the only suspect there.

        One that ran beside others is suspected, however many of its requests broke off.
        """
        if not request.pictures or not self._on:
            return
        key, now = _key(request), self._clock()
        before = self._suspects.pop(key, 0.0)
        if not suspect:
            self._suspects[key] = now + self._seconds
            _forget(self._suspects, self._most)
            if before <= now:
                log.warning("an engine died with this picture", picture=key, engine=engine)
            return
        self._refresh()
        self._held[key] = now + self._seconds
        _forget(self._held, self._most)
        self._save()
        log.error("picture quarantined: a second engine died with it", picture=key, engine=engine, s=self._seconds)

    def tried(self, engine: str) -> None:
        """Record that the suspect at `engine` has left it, and tell those who wait."""
        self.trying.discard(engine)
        self._tried.set()

    async def one_was_tried(self, deadline: float) -> bool:
        """Wait until a suspect has left its engine; False if none is at one, or at `deadline` (time.monotonic())."""
        if not self.trying:
            return False
        self._tried.clear()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._tried.wait()
        except TimeoutError:
            return False
        return True

    def cleared(self, request: ChatRequest) -> None:
        """Record that the request was answered."""
        if self._suspects and request.pictures:
            self._suspects.pop(_key(request), None)

    def release(self) -> None:
        """Release all pictures, and forget all suspicions."""
        self._suspects.clear()
        if self._held:
            log.info("pictures released from quarantine", count=len(self._held))
            self._held.clear()
            self._save()

    def _refresh(self) -> None:
        """Read the file if it was changed, and forget what is over."""
        if self._file is not None:
            try:
                status = self._file.stat()
                at = status.st_mtime_ns, status.st_ino
            except OSError:
                at = None
            if at != self._read_at:
                self._read_at = at
                self._held = OrderedDict()
                with suppress(OSError, ValueError, TypeError, AttributeError):
                    read = json.loads(self._file.read_text(encoding="utf-8")) if at else {}
                    self._held = OrderedDict((str(key), float(until)) for key, until in read.items())
        now = self._clock()
        for key in [key for key, until in self._held.items() if until <= now]:
            del self._held[key]

    def _save(self) -> None:
        if self._file is None:
            return
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps(self._held, indent=1), encoding="utf-8")
            new.replace(self._file)
        except OSError as exc:
            log.warning("the quarantine cannot be saved", file=str(self._file), error=str(exc))


def _key(request: ChatRequest) -> str:
    return " ".join(sorted({picture.sha256 for picture in request.pictures}))


def _forget(entries: OrderedDict[str, float], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
