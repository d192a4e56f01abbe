"""Handles device out-of-memory errors: empties caches, shrinks prefill chunks, preempts, at last fails requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qvl.backends.local.engine_request import Counters, EngineRequest, request_of
from qvl.backends.local.scheduling.sequence import SequenceStatus
from qvl.errors import DeviceMemoryError, first_line
from qvl.log import logger

if TYPE_CHECKING:
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.scheduling.scheduler import Scheduler
    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.scheduling.step import Step

log = logger("qvl.backends.local.engine")

MEMORY_RETRIES: Final = 2
SMALLEST_CHUNK: Final = 32


def memory_error(what: str) -> DeviceMemoryError:
    """Return the error for a request of which `what` ("the prompt", …) does not fit into the device's memory."""
    return DeviceMemoryError(
        f"out of device memory for {what}", hint="fewer or smaller pictures, or a smaller max_pixels"
    )


class OutOfMemoryPolicy:
    """Decides which sequences are retried and which requests fail; its methods re-raise any other kind of error."""

    def __init__(self, runner: Runner, scheduler: Scheduler, counters: Counters) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters

    def explains(self, exc: BaseException) -> bool:
        """True if `exc` is an out-of-memory error of the device."""
        return self._runner.device.is_out_of_memory(exc)

    def release_caches(self, exc: Exception) -> None:
        """Empty the prefix cache, the feature cache and the decode graphs after the out-of-memory error `exc`."""
        if not self.explains(exc):
            raise exc
        self._scheduler.release_prefixes()
        self._runner.release_caches()

    def shed(self, step: Step, exc: Exception) -> list[EngineRequest]:
        """Preempt a sequence after the forward pass of `step` ran out of memory (`exc`).

        That is the one with the largest prefill chunk, else the youngest. The others repeat the step, which writes the
        same keys and values again; those who joined it count on what was not computed, and start again. Returns the
        request to end if its sequence was preempted too often, else none.
        """
        self.release_caches(exc)
        for sequence in step.joined:
            self._scheduler.preempt(sequence)
        self._counters.memory_errors += 1
        running = len(self._scheduler.running)
        log.warning("out_of_memory", running=running, tokens=step.num_tokens, error=first_line(exc))
        suspect = _largest(step)
        suspect.memory_errors += 1
        if suspect.memory_errors > MEMORY_RETRIES:
            return [request_of(suspect)]
        if suspect.status is SequenceStatus.RUNNING:
            self._scheduler.preempt(suspect)
        return []

    def start_over(self, exc: Exception) -> list[EngineRequest]:
        """Preempt all sequences and make half of their KV memory the budget, after growing it failed with `exc`.

        Returns the requests that were preempted too often, to be ended.
        """
        if not self.explains(exc):
            raise exc
        self._counters.memory_errors += 1
        scheduler, kv = self._scheduler, self._scheduler.kv
        tokens = kv.allocated_tokens
        # Of those that had a row: one that only waits is not the cause, and the cause would start over for ever.
        largest = max(scheduler.running or scheduler.waiting, key=lambda sequence: len(sequence.tokens))
        largest.memory_errors += 1
        for sequence in list(scheduler.running):
            scheduler.preempt(sequence)
        scheduler.prefixes.clear()
        self._runner.release()
        kv.reset(budget=max(kv.capacities[-1], tokens // 2))
        log.warning("out_of_memory_growing", budget_tokens=kv.budget, error=first_line(exc))
        return [
            request_of(sequence)
            for sequence in scheduler.waiting
            if sequence.num_preempted > MEMORY_RETRIES and sequence.memory_errors > MEMORY_RETRIES
        ]


def _largest(step: Step) -> Sequence:
    """Return the sequence with the largest prefill chunk, and halve its `max_chunk`; else the youngest in decode."""
    chunk = max(step.prefill, key=lambda chunk: chunk.count, default=None)
    if chunk is None:
        return max(step.decode, key=lambda sequence: sequence.arrival)
    chunk.sequence.max_chunk = max(SMALLEST_CHUNK, chunk.count // 2)
    return chunk.sequence
