"""Several server processes behind one port: a supervisor starts, replaces, signals and ends them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Final

from qvl.errors import ConfigError
from qvl.log import logger
from qvl.server.settings import ServerSettings
from qvl.server.worker_metrics import SupervisorMetrics

# A worker that lived for longer is replaced at once; else its successor waits, twice as long each time.
STEADY_SECONDS: Final = 10.0
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 10.0
SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGHUP")
DIVIDED: Final = ("max_concurrent", "max_queue", "max_queue_picture_tokens", "max_held_bytes")
PER_KEY: Final = ("requests_per_minute", "concurrent_per_key")
log = logger("qvl.server")


@dataclass(frozen=True, slots=True)
class ServerWorker:
    """One server process of several: its number from 0, and what the supervisor handed to it.

    `folder` is where the workers' metrics are. `first` is False for one that replaces another. All but the very first
    accept connections only when they can answer them.
    """

    number: int
    count: int
    first: bool
    folder: Path
    listener: socket.socket
    settled_pipe: int
    parent_pipe: int

    def settled(self) -> None:
        """Tell the supervisor that the model could be opened."""
        os.write(self.settled_pipe, b"1")

    def watch_supervisor(self) -> None:
        """Drain this process when the supervisor is gone, even by SIGKILL."""

        def wait() -> None:
            os.read(self.parent_pipe, 1)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, name="qvl-supervisor", daemon=True).start()

    def share(self, total: int) -> int:
        """Return this worker's part of `total`; the parts of all workers add up to it."""
        return total // self.count + (self.number < total % self.count)

    def divided(self, settings: ServerSettings, *, shared: bool) -> ServerSettings:
        """Return the settings with this worker's part of every limit of a server.

        `shared` limits of API keys are counted in Redis and stay whole; a worker's part of them is in force while Redis
        cannot be reached (see `SharedLimits`).
        """
        names = DIVIDED if shared else DIVIDED + PER_KEY
        parts = {name: self.share(value) for name in names if (value := getattr(settings, name)) is not None}
        return replace(settings, **parts)  # type: ignore[arg-type]  # integers, all of them


def check_divisible(settings: ServerSettings, count: int) -> None:
    """Check that each of `count` workers gets at least 1 of every limit.

    Raises:
        ConfigError: a limit is below the number of workers.
    """
    for name in ("max_concurrent", *PER_KEY):
        value = getattr(settings, name)
        if value is not None and value < count:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} {value} cannot be divided among {count} workers",
                hint=f"fewer --workers, or {option} {count} or more",
                param=name,
            )


def bind_shared(host: str, port: int, bind: Callable[..., socket.socket]) -> socket.socket:
    """Return a listening socket at a port that further ones of this user may share (SO_REUSEPORT).

    Raises:
        ConfigError: another program listens there, with SO_REUSEPORT or without.
    """
    # To a socket without the option a port of others is in use, also where they would share it.
    bind(host, port).close()
    return bind(host, port, shared=True)


class Supervisor:
    """Runs `count` processes of `work`, each with a listening socket of its own at the same port.

    The kernel spreads connections over the sockets. They stay open here when a worker dies, so connections to it wait
    for its successor. Must be used in a process without threads and event loops, since it forks.

    Args:
        count: how many.
        listen: makes one more listening socket.
        work: runs in the new process; its result is the exit code.
    """

    def __init__(self, count: int, listen: Callable[[], socket.socket], work: Callable[[ServerWorker], int]) -> None:
        self.count = count
        self._listen = listen
        self._work = work
        self._folder = Path(tempfile.mkdtemp(prefix="qvl-"))
        self._tally = SupervisorMetrics(self._folder)
        self._listeners: list[socket.socket] = []
        self._pids: dict[int, tuple[int, float]] = {}
        self._early_deaths = 0
        self._ending = False
        self._settled_read, self._settled_write = os.pipe()
        self._parent_read, self._parent_write = os.pipe()

    def run(self) -> int:
        """Return the exit code once all have ended: after SIGTERM or SIGINT, or when the first one cannot start."""
        try:
            with self._forwarding():
                self._start(0, first=True)
                os.close(self._settled_write)
                # Alone until it is ready, so that what is wrong is said once.
                if os.read(self._settled_read, 1):
                    for number in range(1, self.count):
                        if not self._ending:
                            self._start(number, first=True)
                    self._tally.workers(len(self._pids))
                else:
                    self._ending = True
                return self._supervise()
        finally:
            self._close_listeners()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _supervise(self) -> int:
        worst = 0
        while self._pids:
            pid, status = os.waitpid(-1, 0)
            if pid not in self._pids:
                continue
            number, began = self._pids.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if self._ending:
                worst = max(worst, code if code >= 0 else 128 - code)
                continue
            log.error("a worker died and is replaced", worker=number, pid=pid, exit_code=code)
            self._tally.died(pid)
            self._pause(time.monotonic() - began)
            if not self._ending:
                self._start(number, first=False)
        return worst

    def _pause(self, lived: float) -> None:
        self._early_deaths = 0 if lived > STEADY_SECONDS else self._early_deaths + 1
        if self._early_deaths > 1:
            end = time.monotonic() + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self._early_deaths - 2))
            while not self._ending and time.monotonic() < end:
                time.sleep(0.05)

    def _start(self, number: int, *, first: bool) -> None:
        if number == len(self._listeners):
            self._listeners.append(self._listen())
        numbers = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
        # Until the new process has handlers of its own, it would pass on signals to its siblings.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._pids[pid] = (number, time.monotonic())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            return
        code = 1
        try:
            for one in numbers:
                signal.signal(one, signal.SIG_IGN if one == signal.SIGHUP else signal.SIG_DFL)
            # Ctrl-C goes to all processes of a group; the supervisor passes it on, and two would end them at once.
            os.setpgrp()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            os.close(self._parent_write)
            os.close(self._settled_read)
            for other in self._listeners[:number] + self._listeners[number + 1 :]:
                other.close()
            worker = ServerWorker(
                number, self.count, first, self._folder, self._listeners[number], self._settled_write, self._parent_read
            )
            worker.watch_supervisor()
            code = self._work(worker)
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        before = {
            getattr(signal, name): signal.signal(getattr(signal, name), self._forward)
            for name in SIGNALS
            if hasattr(signal, name)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._ending = True
            # Else connections would wait here after the last worker has closed its own.
            self._close_listeners()
        for pid in list(self._pids):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
