"""What processes of a host know together through files: names with the time until when, and who is where alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qvl.log import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logger("qvl.backends")


class SharedTimes:
    """Names, each with the time until which it holds, in a JSON file that every process reads again when it changes.

    Args:
        file: the file; None: in memory.
        most: how many are kept; the oldest are forgotten.
        clock: seconds since the epoch.
    """

    def __init__(self, file: Path | None, most: int, clock: Callable[[], float]) -> None:
        self._file = file
        self._most = most
        self._clock = clock
        self._times: OrderedDict[str, float] = OrderedDict()
        self._read_at: tuple[int, int] | None = None

    def read(self) -> Mapping[str, float]:
        """Return the names that still hold, the oldest first."""
        if self._file is not None:
            try:
                status = self._file.stat()
                at = status.st_mtime_ns, status.st_ino
            except OSError:
                at = None
            if at != self._read_at:
                self._read_at = at
                self._times = OrderedDict()
                with suppress(OSError, ValueError, TypeError, AttributeError):
                    read = json.loads(self._file.read_text(encoding="utf-8")) if at else {}
                    self._times = OrderedDict((str(name), float(until)) for name, until in read.items())
        if self._times:
            now = self._clock()
            for name in [name for name, until in self._times.items() if until <= now]:
                del self._times[name]
        return self._times

    def put(self, name: str, until: float) -> None:
        """Note that a name holds until then, in seconds since the epoch."""
        self.read()
        self._times.pop(name, None)
        self._times[name] = until
        while len(self._times) > self._most:
            self._times.popitem(last=False)
        self._save()

    def drop(self, name: str) -> None:
        """Forget a name."""
        self.read()
        if self._times.pop(name, None) is not None:
            self._save()

    def clear(self) -> None:
        """Forget all names."""
        if self.read():
            self._times.clear()
            self._save()

    def _save(self) -> None:
        if self._file is None:
            return
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps(self._times, indent=1), encoding="utf-8")
            new.replace(self._file)
        except OSError as exc:
            log.warning("the quarantine cannot be saved", file=str(self._file), error=str(exc))


class HostLocks:
    """Locks by name among the processes of a host that name the same file; the end of a process frees its own.

    Within a process they exclude nobody. Without such locks, or where the file cannot be written, all are free.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def take(self, name: str) -> bool:
        """Take a lock; False if another process has it."""
        return self._lock(1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]), wait=False)

    def free(self, name: str) -> None:
        """Free a lock that was taken."""
        self._unlock(1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of this context; it must be short, since they wait."""
        self._lock(0, wait=True)
        try:
            yield
        finally:
            self._unlock(0)

    def _lock(self, place: int, *, wait: bool) -> bool:
        if fcntl is None:
            return True
        try:
            if self._descriptor is None:
                # Kept open: closing it anywhere in the process would free all of its locks.
                self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError) as exc:
            if self._descriptor is not None:
                return False
            log.warning("processes cannot keep suspects apart", file=str(self._file), error=str(exc))
        except OSError as exc:
            log.warning("processes cannot keep suspects apart", file=str(self._file), error=str(exc))
        return True

    def _unlock(self, place: int) -> None:
        if fcntl is not None and self._descriptor is not None:
            with suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, place)
