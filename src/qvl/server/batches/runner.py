"""Runs the batches of a folder in the background of a server, one process at a time, and takes up what was left."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from qvl.errors import QvlError
from qvl.log import logger
from qvl.server.batches.database import ProcessLock
from qvl.server.batches.run_batch import BatchRun
from qvl.server.batches.run_file import Turns

if TYPE_CHECKING:
    from qvl.server.batches.store import BatchStore, StoredBatch
    from qvl.server.route_table import Operation
    from qvl.server.state import ServerCore

LOOK_SECONDS: Final = 1.0
SWEEP_SECONDS: Final = 60.0
# After a batch could not go on (a full disk): what was under way is asked again each time.
PAUSE_SECONDS: Final = 30.0
# Of one key at a time, and of all: further batches wait for their turn.
MAX_ACTIVE_OF_KEY: Final = 2
MAX_ACTIVE: Final = 16
log = logger("qvl.server")


class BatchRunner:
    """The background task of a server that runs the batches of its lane.

    Several processes may serve one folder: the one that holds the lane runs them, and another takes over when it dies.
    """

    def __init__(self, core: ServerCore, store: BatchStore, routes: Mapping[str, Operation]) -> None:
        self.core = core
        self.store = store
        self._routes = routes
        self._lane = ProcessLock(store.folder / f"lane-{store.lane}.lock")
        self._turns = Turns(core, core.settings.batch_concurrency)
        self._active: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._swept = 0.0
        core.metrics.batch_lines.set_function(lambda: float(self._turns.running))

    def wake(self) -> None:
        """Look for batches now. Must be called on the server's event loop; the first call starts the task."""
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End all work; what was under way is asked again by the next process."""
        tasks = [task for task in (self._task, *(task for _, task in self._active.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lane.give_back()
        self.store.database.close()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                if self.store.database.exists and not self.core.draining:
                    await self._look()
            except QvlError as exc:
                log.error("batches cannot be run", error=str(exc))
            except Exception:
                log.exception("batches cannot be run")
            try:
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    async def _look(self) -> None:
        """Start the batches whose turn it is."""
        if not await asyncio.to_thread(self._lane.take):
            return
        if time.monotonic() - self._swept > SWEEP_SECONDS or not self._swept:
            self._swept = time.monotonic()
            await asyncio.to_thread(self.store.sweep)
        batches = await asyncio.to_thread(self.store.unfinished)
        of_key = Counter(tenant for tenant, _ in self._active.values())
        for batch in batches:
            over = batch.status == "cancelling" or batch.expires_at <= self.store.now()
            # The batches of a key that is not accepted any more stand still until it is, or their time is over.
            if batch.id in self._active or not (over or self.core.keys.accepts(batch.tenant)):
                continue
            if not over and (len(self._active) >= MAX_ACTIVE or of_key[batch.tenant] >= MAX_ACTIVE_OF_KEY):
                continue
            of_key[batch.tenant] += 1
            task = asyncio.create_task(self._process(batch))
            self._active[batch.id] = batch.tenant, task
            task.add_done_callback(partial(self._ended, batch.id))
        by_status = await asyncio.to_thread(self.store.by_status)
        for status in ("validating", "in_progress", "finalizing", "cancelling"):
            self.core.metrics.batches.labels(status).set(by_status.get(status, 0))
        self.core.metrics.batch_bytes.set(await asyncio.to_thread(self.store.used))

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._active.pop(batch_id, None)
        self._wake.set()

    async def _process(self, batch: StoredBatch) -> None:
        try:
            await BatchRun(self.core, self.store, self._routes, self._turns, batch).run()
        except QvlError as exc:
            log.error("batch interrupted", batch=batch.id, error=str(exc))
            await asyncio.sleep(PAUSE_SECONDS)
        except Exception:
            log.exception("batch interrupted", batch=batch.id)
            await asyncio.sleep(PAUSE_SECONDS)
