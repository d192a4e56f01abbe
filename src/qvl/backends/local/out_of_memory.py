"""What the engine does when the device's memory does not suffice: give back, make smaller, and at last refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qvl.backends.local.engine_request import Counters, EngineRequest, request_of
from qvl.backends.local.scheduling.sequence import SequenceStatus
from qvl.errors import DeviceMemoryError, first_line
from qvl.log import logger

if TYPE_CHECKING:
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.scheduling.scheduler import Scheduler, Step
    from qvl.backends.local.scheduling.sequence import Sequence

log = logger("qvl.backends.local.engine")

MEMORY_RETRIES: Final = 2
SMALLEST_CHUNK: Final = 32


def memory_error(what: str) -> DeviceMemoryError:
    """Return the error of a request whose `what` (its prompt, its pictures, …) does not fit into memory."""
    return DeviceMemoryError(
        f"the device's memory does not suffice for {what}", hint="fewer or smaller pictures, or a smaller max_pixels"
    )


class OutOfMemoryPolicy:
    """Decides who runs again, smaller, and who ends. Each method raises an error of another kind again."""

    def __init__(self, runner: Runner, scheduler: Scheduler, counters: Counters) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters

    def explains(self, exc: BaseException) -> bool:
        """True if `exc` is the device's lack of memory."""
        return self._runner.device.is_out_of_memory(exc)

    def release_caches(self, exc: Exception) -> None:
        """Give back what is kept for later alone, after `exc`."""
        if not self.explains(exc):
            raise exc
        self._scheduler.prefixes.clear()
        self._runner.release_caches()

    def shed(self, step: Step, exc: Exception) -> list[EngineRequest]:
        """After `exc` in a forward pass: have whoever brought the most tokens come back smaller.

        Nothing is lost for the others: keys that were written twice are the same keys. Returns the requests that came
        back too often, to be ended.
        """
        self.release_caches(exc)
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
        """After `exc` while KV storage grew: drop all rows, have sequences run again within what there was.

        Returns the requests that were given up, to be ended.
        """
        if not self.explains(exc):
            raise exc
        self._counters.memory_errors += 1
        scheduler, kv = self._scheduler, self._scheduler.kv
        tokens = kv.held_tokens
        for sequence in list(scheduler.running):
            scheduler.preempt(sequence)
        youngest = max(scheduler.waiting, key=lambda sequence: sequence.arrival)
        youngest.memory_errors += 1
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
    """Return the sequence with the most prompt tokens, its chunks made smaller; else the youngest that decodes."""
    chunk = max(step.prefill, key=lambda chunk: chunk.count, default=None)
    if chunk is None:
        return max(step.decode, key=lambda sequence: sequence.arrival)
    chunk.sequence.max_chunk = max(SMALLEST_CHUNK, chunk.count // 2)
    return chunk.sequence
