"""The loop: schedule, run, hand out; on a thread of its own.

Requests and aborts come in through an inbox that is emptied between steps. Chunks go out once a step, with one wake-up
for each event loop that waits. What goes wrong with one request ends it; when the loop fails, all waiters learn it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from qvl.backends.local.engine_request import Counters, EngineRequest
from qvl.backends.local.model import sampler
from qvl.backends.local.picture_encoder import Pictures
from qvl.backends.local.scheduling.prefix_cache import BLOCK
from qvl.backends.local.scheduling.scheduler import Scheduler, Step
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.errors import (
    BackendError,
    BackendUnavailableError,
    DeviceMemoryError,
    EngineDeadError,
    QvlError,
    RateLimitError,
    RequestError,
)
from qvl.log import logger
from qvl.types import Chunk

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.model.sampler import Sampled
    from qvl.backends.local.text.detokenizer import Detokenizer
    from qvl.backends.local.text.grammar import Grammars
    from qvl.types import FinishReason

log = logger(__name__)

MEMORY_RETRIES: Final = 2
SMALLEST_CHUNK: Final = 32


class Engine:
    """Runs jobs until closed.

    Args:
        max_queue: jobs that may wait for a row; more are refused.
        watchdog: seconds without a token, while something runs, after which `stalled` says so.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        grammars: Grammars,
        eos_token_ids: Iterable[int],
        *,
        max_queue: int,
        watchdog: float,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.counters = Counters()
        self.error: EngineDeadError | None = None
        self._grammars = grammars
        self._eos = frozenset(eos_token_ids)
        self._max_queue = max_queue
        self._watchdog = watchdog
        self._wake = threading.Condition()
        self._arrived: deque[EngineRequest] = deque()
        self._aborted: deque[EngineRequest] = deque()
        self._jobs: set[EngineRequest] = set()
        self._pictures = Pictures(runner, scheduler.max_num_batched_tokens, self._release_caches, self._fail_picture)
        self._closing = False
        self._out: dict[asyncio.AbstractEventLoop, list[tuple[EngineRequest, Chunk | QvlError]]] = defaultdict(list)
        self._last_token = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="qvl-engine", daemon=True)
        self._guard = threading.Thread(target=self._watch, name="qvl-watchdog", daemon=True)
        self._stop_watching = threading.Event()

    def start(self) -> None:
        self._thread.start()
        self._guard.start()

    def submit(self, job: EngineRequest) -> None:
        """Puts a job behind the others. Any thread.

        Raises:
            RateLimitError: the queue is full.
            EngineDeadError, BackendUnavailableError: the loop has ended.
        """
        with self._wake:
            self._refuse_when_down()
            if len(self._arrived) + len(self.scheduler.waiting) >= self._max_queue:
                raise RateLimitError(
                    f"{self._max_queue} requests are waiting already", hint="try again later", retry_after=1.0
                )
            self._jobs.add(job)
            self._arrived.append(job)
            self._wake.notify()

    def abort(self, job: EngineRequest) -> None:
        """Ends a job before the next step. Any thread; harmless when it has ended."""
        with self._wake:
            if job in self._jobs:
                self._aborted.append(job)
                self._wake.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Ends the loop after the step that runs; waiters get BackendUnavailableError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._stop_watching.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def stalled(self) -> str | None:
        """Why the engine seems to hang, or None."""
        quiet = time.monotonic() - self._last_token
        if self._jobs and quiet > self._watchdog:
            return f"{len(self.scheduler.running)} requests running, no token for {quiet:.0f} s"
        return None

    def _refuse_when_down(self) -> None:
        if self.error is not None:
            raise self.error
        if self._closing:
            raise BackendUnavailableError("the engine is closed")

    # The thread.

    def _run(self) -> None:
        import torch

        try:
            self.runner.device.select()
            with torch.inference_mode():
                while self._next():
                    self._step()
                    self._flush()
            self._fail_all(lambda: BackendUnavailableError("the engine was closed with this request in flight"))
        except BaseException as exc:
            reason = f"the engine's loop ended: {type(exc).__name__}: {str(exc).strip()[:300]}"
            log.error("engine_dead", error=reason, exc_info=exc)
            with self._wake:
                self.error = EngineDeadError(reason.splitlines()[0], hint="restart; the log has the traceback")
            self._fail_all(lambda: EngineDeadError(reason.splitlines()[0]))

    def _next(self) -> bool:
        """Waits for work and takes what has come in; False when the engine is to end."""
        with self._wake:
            if not (self._jobs or self._closing):
                self._wake.wait_for(lambda: self._jobs or self._closing)
                self._last_token = time.monotonic()
            arrived, aborted = list(self._arrived), list(self._aborted)
            self._arrived.clear()
            self._aborted.clear()
            closing = self._closing
        for job in arrived:
            self.counters.requests += 1
            self.counters.prompt_tokens += len(job.prepared.tokens)
            for sequence in job.sequences:
                self.scheduler.add(sequence)
        for job in aborted:
            if job in self._jobs:
                self.counters.aborted += 1
                self._end(job)
        return not closing

    def _step(self) -> None:
        step = self.scheduler.schedule()
        ops = self.scheduler.kv.take_ops()
        try:
            self.runner.apply(ops)
        except Exception as exc:
            if not self.runner.device.is_out_of_memory(exc):
                raise
            self._start_over(exc)
            return
        if not (step or self._pictures):
            return
        now = time.perf_counter()
        for chunk in step.prefill:
            job: EngineRequest = chunk.sequence.group
            job.scheduled = job.scheduled or now
        try:
            self._pictures.encode(step)
            self._pictures.encode_slice()
            self._last_token = time.monotonic()
            if not step:
                return
            sampled, logits = self.runner.forward(step)
            self._advance(step)
            tokens = self._sample(sampled, logits)
            self._save(step)
        except Exception as exc:
            if not self.runner.device.is_out_of_memory(exc):
                raise
            self._shed(step, exc)
            return
        self.counters.steps += 1
        self._last_token = time.monotonic()
        for sequence, token in tokens:
            self._accept(sequence, token)

    def _advance(self, step: Step) -> None:
        for sequence in step.decode:
            sequence.num_computed = len(sequence.tokens)
        for chunk in step.prefill:
            chunk.sequence.num_computed = chunk.end

    def _save(self, step: Step) -> None:
        """Keeps the prompts that are complete now as prefixes."""
        for chunk in step.prefill:
            if chunk.samples:
                self._save_prefix(chunk.sequence)

    def _save_prefix(self, sequence: Sequence) -> None:
        prefixes = self.scheduler.prefixes
        if not prefixes.max_blocks or sequence.slot is None:
            return
        hashes = sequence.hashes.extend(sequence.tokens[: sequence.num_computed])
        pairs = prefixes.insert(hashes[: sequence.num_computed // BLOCK])
        self.runner.save(sequence, pairs, prefixes.reserved)

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[Sequence, Sampled]]:
        if not sequences:
            return []
        matchers = [None if self._output(s).in_reasoning else s.matcher for s in sequences]
        mask = self._grammars.mask(matchers, logits.device) if any(matchers) else None
        return list(zip(sequences, sampler.sample(logits, sequences, mask), strict=True))

    @staticmethod
    def _output(sequence: Sequence) -> Detokenizer:
        output: Detokenizer = sequence.group.outputs[sequence.index]
        return output

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        """Appends a token, hands out its text, and ends the sequence where it ends."""
        job: EngineRequest = sequence.group
        if sequence.status is not SequenceStatus.RUNNING:
            return
        now = time.perf_counter()
        job.first_token = job.first_token or now
        self.counters.generated_tokens += 1
        output, sampling, token = self._output(sequence), sequence.sampling, sampled.token
        guided = sequence.matcher is not None and not output.in_reasoning
        sequence.append(token)
        if guided and not self._matches(sequence, token):
            return
        reason: FinishReason | None = None
        if token in sampling.stop_token_ids or (token in self._eos and (guided or not sampling.ignore_eos)):
            reason = "stop"
        else:
            try:
                chunk = output.push(sampled)
            except QvlError as exc:
                self._fail(job, exc)
                return
            if chunk is not None:
                self._send(job, chunk)
            if output.stopped or (guided and sequence.matcher.is_stopped()):
                reason = "stop"
            elif sequence.remaining <= 0:
                reason = "length"
        if reason is not None:
            self._finish(sequence, output.finish(reason), now)

    def _matches(self, sequence: Sequence, token: int) -> bool:
        """Tells the grammar of the token; ends the request when that fails."""
        matcher = sequence.matcher
        try:
            if not matcher.is_error() and matcher.consume_token(token) and not matcher.is_error():
                return True
            reason = _line(matcher.get_error())
        except Exception as exc:  # noqa: BLE001 - the fault of one grammar
            reason = _line(exc)
        # The compiler took it, and its limits end it here, which it calls stopped: no end of a good answer.
        what = f"the schema or pattern is too complex to be enforced: {reason}"
        self._fail(sequence.group, RequestError(what, hint="simplify it", code="invalid_schema"))
        return False

    def _finish(self, sequence: Sequence, last: Chunk, now: float) -> None:
        job: EngineRequest = sequence.group
        sequence.finish_reason = last.finish_reason
        # The newest token has no KV yet; everything before it can serve the next turn.
        try:
            self._save_prefix(sequence)
        except Exception as exc:
            if not self.runner.device.is_out_of_memory(exc):
                raise
            self._release_caches()
        self.scheduler.finish(sequence)
        job.num_finished += 1
        if job.done:
            last = replace(last, usage=job.usage(), timing=job.timing(now))
            self._end(job)
        self._send(job, last)

    # Ends and faults.

    def _end(self, job: EngineRequest) -> None:
        """Forgets a job and frees all it holds."""
        for sequence in job.sequences:
            self.scheduler.finish(sequence)
        for picture in job.prepared.pictures:
            picture.features = picture.pixels = picture.encoding = None
        with self._wake:
            self._jobs.discard(job)

    def _fail(self, job: EngineRequest, error: QvlError, cause: BaseException | None = None) -> None:
        if job not in self._jobs:
            return
        error.__cause__ = cause
        self.counters.failed += 1
        log.info("request_failed", request_id=job.request_id, error=str(error))
        self._end(job)
        self._send(job, error)

    def _fail_picture(self, job: EngineRequest, exc: Exception) -> None:
        if self.runner.device.is_out_of_memory(exc):
            self.counters.memory_errors += 1
            self._fail(job, _memory_error("the pictures of this request"), exc)
        else:
            self._fail(job, BackendError(f"a picture could not be encoded: {_line(exc)}"), exc)

    def _shed(self, step: Step, exc: Exception) -> None:
        """Out of memory in a forward pass: whoever brought the most tokens comes back smaller, and at last not at all.

        Nothing is lost for the others: keys that were written twice are the same keys.
        """
        self.counters.memory_errors += 1
        log.warning("out_of_memory", running=len(self.scheduler.running), tokens=step.num_tokens, error=_line(exc))
        self._release_caches()
        largest = max(step.prefill, key=lambda chunk: chunk.count, default=None)
        if largest is not None:
            suspect = largest.sequence
            suspect.max_chunk = max(SMALLEST_CHUNK, largest.count // 2)
        else:
            suspect = max(step.decode, key=lambda sequence: sequence.arrival)
        suspect.memory_errors += 1
        if suspect.memory_errors > MEMORY_RETRIES:
            self._fail(suspect.group, _memory_error("this request"), exc)
        elif suspect.status is SequenceStatus.RUNNING:
            self.scheduler.preempt(suspect)

    def _start_over(self, exc: Exception) -> None:
        """Out of memory while KV storage grew: all rows are dropped and sequences run again, within what there was."""
        self.counters.memory_errors += 1
        kv = self.scheduler.kv
        held = kv.held_tokens
        for sequence in list(self.scheduler.running):
            self.scheduler.preempt(sequence)
        youngest = max(self.scheduler.waiting, key=lambda sequence: sequence.arrival)
        youngest.memory_errors += 1
        self.scheduler.prefixes.clear()
        self.runner.release()
        kv.reset(budget=max(kv.capacities[-1], held // 2))
        log.warning("out_of_memory_growing", budget_tokens=kv.budget, error=_line(exc))
        for sequence in list(self.scheduler.waiting):
            if sequence.num_preempted > MEMORY_RETRIES and sequence.memory_errors > MEMORY_RETRIES:
                self._fail(sequence.group, _memory_error("this request"), exc)

    def _release_caches(self) -> None:
        self.scheduler.prefixes.clear()
        self.runner.release_caches()

    def _fail_all(self, error: Callable[[], QvlError]) -> None:
        with self._wake:
            jobs = list(self._jobs)
        for job in jobs:
            try:
                self._end(job)
            finally:
                self._send(job, error())
        self._flush()

    # Hand-over to event loops.

    def _send(self, job: EngineRequest, item: Chunk | QvlError) -> None:
        self._out[job.loop].append((job, item))

    def _flush(self) -> None:
        """One wake-up for each event loop and step."""
        for loop, items in self._out.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                # That loop is closed: nobody waits any more.
                for job, _ in items:
                    self.abort(job)
        self._out = defaultdict(list)

    def _watch(self) -> None:
        reported = False
        while not self._stop_watching.wait(min(self._watchdog / 4, 5.0)):
            reason = self.stalled
            if reason and not reported:
                log.warning("engine_stalled", reason=reason)
            reported = reason is not None


def _deliver(items: list[tuple[EngineRequest, Any]]) -> None:
    for job, item in items:
        job.inbox.put_nowait(item)


def _memory_error(what: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the device's memory does not suffice for {what}", hint="fewer or smaller pictures, or a smaller max_pixels"
    )


def _line(exc: object) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else type(exc).__name__
