"""Pictures that killed engines: one that did it twice is refused, instead of being tried on the next one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

from qvl.backends.shared_times import HostLocks, SharedTimes
from qvl.errors import MediaError
from qvl.log import logger
from qvl.types import ChatRequest

STRIKES: Final = 2
SECONDS: Final = 3600.0
MOST: Final = 256
# Between two looks whether another process has freed an engine.
ELSEWHERE_SECONDS: Final = 0.05
log = logger("qvl.backends")


class Quarantine:
    """Counts which pictures were being answered when an engine died.

    All pictures of a request count together. Whoever was there at a death is a suspect: callers send suspects to an
    engine one at a time, so that a second death has one cause. An answer clears them.

    Args:
        file: keeps the quarantined pictures over restarts and for all processes that name it, as a JSON object of
            `sha256:…` (several joined by a space) and the time until when; what is deleted from it is released. Beside
            it are `FILE.suspects`, of the same form, and `FILE.lock`: the processes of a host suspect together, and
            try one suspect at a time at an engine. None: in memory.
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
        path = None if file is None else Path(file)
        self._seconds = seconds
        self._clock = clock
        self._on = on
        self._held = SharedTimes(path, most, clock)
        self._suspects = SharedTimes(None if path is None else path.with_name(f"{path.name}.suspects"), most, clock)
        self._locks = None if path is None else HostLocks(path.with_name(f"{path.name}.lock"))
        self.refused = 0
        # The engines at which suspects of this process run, one at each, and their pictures.
        self.trying: set[str] = set()
        self._pictures: set[str] = set()
        self._tried = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of pictures in quarantine."""
        return len(self._held.read())

    def watches(self) -> bool:
        """Return True if there are pictures in quarantine or suspects, so that hashes matter."""
        return bool(self._held.read() or self._suspects.read())

    def refuse(self, request: ChatRequest) -> None:
        """Check that no picture of the request is in quarantine.

        Raises:
            MediaError: one is; it names the picture.
        """
        held = self._held.read()
        if not held or not request.pictures:
            return
        hashes = [picture.sha256 for picture in request.pictures]
        for key, until in held.items():
            names = key.split(" ")
            if set(names) <= set(hashes):
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
        suspects = self._suspects.read()
        return bool(suspects and request.pictures) and _key(request) in suspects

    def killed(self, request: ChatRequest, engine: str, *, suspect: bool) -> None:
        """Record that `engine` died while it answered the request; `suspect`: as the only suspect there.

        One that ran beside others is suspected, however many of its requests broke off.
        """
        if not request.pictures or not self._on:
            return
        key = _key(request)
        with self._alone():
            if not suspect:
                if key not in self._suspects.read():
                    log.warning("an engine died with this picture", picture=key, engine=engine)
                self._suspects.put(key, self._clock() + self._seconds)
                return
            self._suspects.drop(key)
            self._held.put(key, self._clock() + self._seconds)
        log.error("picture quarantined: a second engine died with it", picture=key, engine=engine, s=self._seconds)

    def begin(self, request: ChatRequest, engine: str) -> bool:
        """Record that a suspect goes to `engine`, until `tried`.

        False, and nothing is recorded, if one is there, or another request with these pictures is at any engine: two of
        them would cost two.
        """
        pictures = _key(request)
        if engine in self.trying or pictures in self._pictures:
            return False
        if self._locks is not None:
            if not self._locks.take(engine):
                return False
            if not self._locks.take(pictures):
                self._locks.free(engine)
                return False
        self.trying.add(engine)
        self._pictures.add(pictures)
        return True

    def tried(self, request: ChatRequest, engine: str) -> None:
        """Record that the suspect at `engine` has left it, and tell those who wait."""
        pictures = _key(request)
        self.trying.discard(engine)
        self._pictures.discard(pictures)
        if self._locks is not None:
            self._locks.free(engine)
            self._locks.free(pictures)
        self._tried.set()

    async def one_was_tried(self, deadline: float, *, elsewhere: bool = False) -> bool:
        """Wait until a suspect has left its engine; False if none is at one, or at `deadline` (time.monotonic()).

        `elsewhere`: those of other processes, which tell nobody, are waited for too: True after a moment.
        """
        if not self.trying and not elsewhere:
            return False
        self._tried.clear()
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(left, ELSEWHERE_SECONDS) if elsewhere else left):
                await self._tried.wait()
        except TimeoutError:
            return elsewhere and left > ELSEWHERE_SECONDS
        return True

    def cleared(self, request: ChatRequest) -> None:
        """Record that the request was answered."""
        if self.suspects(request):
            with self._alone():
                self._suspects.drop(_key(request))

    def release(self) -> None:
        """Release all pictures, and forget all suspicions."""
        with self._alone():
            self._suspects.clear()
            if held := self._held.read():
                log.info("pictures released from quarantine", count=len(held))
                self._held.clear()

    def _alone(self) -> AbstractContextManager[None]:
        return nullcontext() if self._locks is None else self._locks.alone()


def _key(request: ChatRequest) -> str:
    return " ".join(sorted({picture.sha256 for picture in request.pictures}))
