"""A whole file of lines: several asked at a time, behind whoever waits for an answer, each written when it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from qvl.errors import ConfigError, QvlError
from qvl.server.batches.ask_line import Outage, ask_patiently
from qvl.server.batches.lines import BatchLine, LineReader, parse_line
from qvl.server.batches.outputs import Outputs, answered, line_id, unanswered
from qvl.server.request_body import SMALL_BODY, checked_json

if TYPE_CHECKING:
    from qvl.server.route_table import Operation
    from qvl.server.state import ServerCore

_LOOK_SECONDS: Final = 0.02


class Turns:
    """Whose turn it is: at most `most` lines of all batches at a time, and only one while other requests wait."""

    def __init__(self, core: ServerCore, most: int) -> None:
        self.core = core
        self.running = 0
        self.outage = Outage()
        self._slots = asyncio.Semaphore(most)

    async def take(self, stopping: Callable[[], bool]) -> bool:
        """Wait for a turn; return False if `stopping()` became true first."""
        while not stopping():
            try:
                async with asyncio.timeout(0.25):
                    await self._slots.acquire()
                break
            except TimeoutError:
                continue
        else:
            return False
        while not stopping():
            # The one keeps a batch going under a load that never ends.
            if self.core.readiness.closed() is None and not (self.running and self.core.waiting()):
                self.running += 1
                return True
            self.core.start()
            await asyncio.sleep(_LOOK_SECONDS)
        self._slots.release()
        return False

    def give_back(self) -> None:
        self.running -= 1
        self._slots.release()


class FileRun:
    """Asks the lines of one file that have no answer yet.

    Args:
        routes: the handler of each URL that a line may name.
        scope: goes into the ids of the answers, to tell batches apart.
        stopping: asked before each line; lines under way are finished all the same.
    """

    def __init__(
        self,
        core: ServerCore,
        routes: Mapping[str, Operation],
        turns: Turns,
        outputs: Outputs,
        *,
        tenant: str = "",
        scope: str = "",
        stopping: Callable[[], bool] = lambda: False,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.core = core
        self.outputs = outputs
        self._routes = routes
        self._turns = turns
        self._tenant = tenant
        self._scope = scope
        self._given = stopping
        self._advance = advance
        self._failure: QvlError | None = None
        self._dropped = False

    def _stopping(self) -> bool:
        return self.core.draining or self._failure is not None or self._given()

    async def run(self, path: Path) -> bool:
        """Ask what is not in the outputs; return True if nothing is left to ask.

        Raises:
            ConfigError: an answer in the outputs is not one to this file.
            QvlError: an answer cannot be written.
        """
        complete = True
        tasks: set[asyncio.Task[None]] = set()
        try:
            with LineReader(path, self.core.settings.max_body_bytes) as reader:
                while complete and (chunk := await anyio.to_thread.run_sync(reader.chunk)):
                    for line, identity in await self._open(chunk):
                        if not await self._turns.take(self._stopping):
                            complete = False
                            break
                        task = asyncio.create_task(self._one(line, identity))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        return complete and not self._dropped

    async def _open(self, chunk: list[tuple[int, bytes]]) -> list[tuple[BatchLine, str]]:
        """Return the requests of a chunk that have no answer yet, each with the id of its answer."""
        for _, raw in chunk:
            if len(raw) > SMALL_BODY:
                await checked_json(raw)
        return await anyio.to_thread.run_sync(self._unanswered, chunk)

    def _unanswered(self, chunk: list[tuple[int, bytes]]) -> list[tuple[BatchLine, str]]:
        found = []
        for number, raw in chunk:
            line = parse_line(number, raw, self._routes)
            identity = line_id(self._scope, raw)
            known = self.outputs.done.get(line.custom_id)
            if known is None:
                found.append((line, identity))
            elif known != identity:
                raise ConfigError(
                    f"{self.outputs.answers} has the answer to another request of the custom_id {line.custom_id!r}",
                    hint="the input was changed since: name another output, or move that file away",
                )
        return found

    async def _one(self, line: BatchLine, identity: str) -> None:
        """Ask one line and write its answer."""
        try:
            route = self._routes[line.url]
            answer = await ask_patiently(self.core, route, line, self._tenant, self._stopping, self._turns.outage)
            if answer is None:
                self._dropped = True
                return
            written = answered(identity, line.custom_id, answer.status, answer.request_id, answer.body())
            await asyncio.to_thread(self.outputs.add, written, failed=answer.status >= 400)
            self._advance()
        except QvlError as exc:
            self._failure = exc
        finally:
            # Not before it is written: else a kill would lose more answers than there are turns.
            self._turns.give_back()

    async def give_up(self, path: Path, code: str, message: str) -> None:
        """Write an error for each line that was not asked."""

        def write(chunk: list[tuple[int, bytes]]) -> None:
            for line, identity in self._unanswered(chunk):
                self.outputs.add(unanswered(identity, line.custom_id, code, message), failed=True)

        with LineReader(path, self.core.settings.max_body_bytes) as reader:
            while chunk := await anyio.to_thread.run_sync(reader.chunk):
                await anyio.to_thread.run_sync(write, chunk)
