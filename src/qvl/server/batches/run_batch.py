"""One stored batch on its way from `validating` to its end, from wherever a process before left it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qvl.errors import RateLimitError
from qvl.log import logger
from qvl.server.batches.lines import LineError, check_lines
from qvl.server.batches.outputs import Outputs
from qvl.server.batches.run_file import FileRun, Turns

if TYPE_CHECKING:
    from qvl.server.batches.objects import LineProblem, Status
    from qvl.server.batches.store import BatchStore, StoredBatch
    from qvl.server.route_table import Operation
    from qvl.server.state import ServerCore

NOTE_SECONDS: Final = 0.5
_RAN_OUT: Final = "This request could not be executed before the completion window expired."
log = logger("qvl.server")


class BatchRun:
    """Runs one batch. Lines that are under way are finished when it is cancelled or its time is over."""

    def __init__(
        self, core: ServerCore, store: BatchStore, routes: Mapping[str, Operation], turns: Turns, batch: StoredBatch
    ) -> None:
        self.core = core
        self.store = store
        self.batch = batch
        self._input = store.path(batch.input_file_id)
        self._outputs = Outputs(store.path(batch.answers_id), store.path(batch.errors_id))
        self._status: str = batch.status
        self._full: RateLimitError | None = None
        self._counted = (0, 0)
        self._run = FileRun(
            core, routes, turns, self._outputs, tenant=batch.tenant, scope=batch.id, stopping=self._stopping
        )

    @property
    def _expired(self) -> bool:
        return self.batch.expires_at <= self.store.now()

    def _stopping(self) -> bool:
        return (
            self._status not in ("validating", "in_progress")
            or self._full is not None
            or self._expired
            or not self.core.keys.accepts(self.batch.tenant)
        )

    async def run(self) -> None:
        """Bring the batch to its end, or to where another run can go on.

        Raises:
            QvlError: a file cannot be read or written.
        """
        try:
            await self._go_on()
        except LineError as exc:
            # The file was checked: somebody changed it, or this server has fewer routes than the one that checked it.
            await self._end("failed", [exc.problem()])
        except FileNotFoundError:
            await self._end("failed", [LineError(None, "file_not_found", "the input file is gone").problem()])

    async def _go_on(self) -> None:
        if self._status == "validating" and not self._expired:
            await self._validate()
            if self._status == "failed":
                return
        await asyncio.to_thread(self._outputs.resume)
        self._counted = (self._outputs.completed, self._outputs.failed)
        noting = asyncio.create_task(self._note_again_and_again())
        try:
            complete = self._status == "in_progress" and await self._run.run(self._input)
        finally:
            noting.cancel()
        await self._note()
        if complete:
            await self._end("completed")
        elif self._status == "cancelling":
            await self._end("cancelled")
        elif self._full is not None:
            await self._end("failed", [LineError(None, self._full.code, str(self._full)).problem()])
        elif self._status == "finalizing":
            await self._end("completed")
        elif self._expired:
            await self._run.give_up(self._input, "batch_expired", _RAN_OUT)
            await self._end("expired")

    async def _validate(self) -> None:
        batch = self.batch
        count, model, problems = await check_lines(
            self._input, {batch.endpoint}, self.core.served, max_line=self.core.settings.max_body_bytes
        )
        if problems:
            if await asyncio.to_thread(self.store.fail, batch.id, problems, count):
                self._status = "failed"
                self._tell("failed")
                return
        else:
            columns = {"total": count, "model": model}
            if await asyncio.to_thread(lambda: self.store.change(batch.id, "in_progress", "validating", **columns)):
                self._status = "in_progress"
                return
        # It was cancelled meanwhile.
        self._status = "cancelling"

    async def _note_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(NOTE_SECONDS)
            await self._note()

    async def _note(self) -> None:
        """Store the counts, and learn what another process wants of the batch."""
        self._status = await asyncio.to_thread(self.store.note_progress, self.batch.id, self._outputs)
        self._count()
        try:
            await asyncio.to_thread(self.store.refuse_if_full, self.batch.tenant)
        except RateLimitError as exc:
            self._full = exc

    def _count(self) -> None:
        """Count in the metrics what was written since the last time."""
        now = (self._outputs.completed, self._outputs.failed)
        for outcome, before, after in zip(("completed", "failed"), self._counted, now, strict=True):
            self.core.metrics.batch_requests.inc(after - before, outcome)
        self._counted = now

    async def _end(self, status: Status, problems: list[LineProblem] | None = None) -> None:
        if status == "completed":
            change = self.store.change
            if not await asyncio.to_thread(change, self.batch.id, "finalizing", "in_progress", "finalizing"):
                # Cancelled behind its last line.
                status = "cancelled"
        await asyncio.to_thread(self.store.finish, self.batch, status, self._outputs, problems or ())
        self._count()
        self._tell(status)

    def _tell(self, status: str) -> None:
        counts = {"completed": self._outputs.completed, "failed": self._outputs.failed}
        self.core.metrics.batches_ended.inc(1, status)
        log.info("batch ended", batch=self.batch.id, status=status, **counts)
