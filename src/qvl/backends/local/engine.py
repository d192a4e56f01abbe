"""The loop of a thread of its own: every step schedules, encodes pictures, executes and emits.

What goes wrong with one request ends it; when the loop fails, all waiters learn it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from qvl.backends.local.engine_request import Counters, EngineRequest, request_of
from qvl.backends.local.mailbox import Mailbox
from qvl.backends.local.model import sampler
from qvl.backends.local.out_of_memory import OutOfMemoryPolicy, memory_error
from qvl.backends.local.picture_encoder import PictureEncoder
from qvl.backends.local.scheduling.prefix_cache import BLOCK
from qvl.backends.local.scheduling.scheduler import Scheduler, Step
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.backends.local.text.grammar import consume
from qvl.errors import BackendError, BackendUnavailableError, EngineDeadError, QvlError, first_line
from qvl.log import logger

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.model.sampler import Sampled
    from qvl.backends.local.text.detokenizer import Detokenizer
    from qvl.backends.local.text.grammar import Grammars
    from qvl.types import FinishReason

log = logger(__name__)


class Engine:
    """Runs requests until closed.

    Args:
        max_queue: requests that may wait for a row; more are refused.
        watchdog: seconds without a token, while something runs, after which `unready` says so.
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
        self.mailbox = Mailbox(scheduler.waiting, max_queue)
        self._grammars = grammars
        self._eos = frozenset(eos_token_ids)
        self._memory = OutOfMemoryPolicy(runner, scheduler, self.counters)
        self._pictures = PictureEncoder(runner, self._memory, scheduler.max_num_batched_tokens, self._fail_picture)
        self._last_token = time.monotonic()
        self._watchdog = watchdog
        self._stop_watching = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qvl-engine", daemon=True)
        self._guard = threading.Thread(target=self._watch, name="qvl-watchdog", daemon=True)

    def start(self) -> None:
        """Start the engine's thread and its watchdog's."""
        self._thread.start()
        self._guard.start()

    def close(self, timeout: float = 10.0) -> None:
        """End the loop after the step that runs; waiters get BackendUnavailableError."""
        self.mailbox.close()
        self._stop_watching.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def unready(self) -> str | None:
        """Return why the engine cannot work or seems to hang, or None."""
        error = self.mailbox.error
        return self._stalled() if error is None else str(error)

    def _stalled(self) -> str | None:
        quiet = time.monotonic() - max(self._last_token, self.mailbox.busy_since)
        if len(self.mailbox) and quiet > self._watchdog:
            return f"{len(self.scheduler.running)} requests running, no token for {quiet:.0f} s"
        return None

    # The threads.

    def _run(self) -> None:
        import torch

        try:
            self.runner.device.select()
            with torch.inference_mode():
                while self._take_mail():
                    self.step()
                    self.mailbox.flush()
            self._fail_all(lambda: BackendUnavailableError("the engine was closed with this request in flight"))
        except BaseException as exc:
            reason = f"the engine's loop ended: {type(exc).__name__}: {str(exc).strip()[:300]}"
            log.error("engine_dead", error=reason, exc_info=exc)
            reason = reason.splitlines()[0]
            self.mailbox.close(EngineDeadError(reason, hint="restart; the log has the traceback"))
            self._fail_all(lambda: EngineDeadError(reason))

    def _watch(self) -> None:
        reported = False
        while not self._stop_watching.wait(min(self._watchdog / 4, 5.0)):
            reason = self._stalled()
            if reason and not reported:
                log.warning("engine_stalled", reason=reason)
            reported = reason is not None

    def _take_mail(self) -> bool:
        """Queue what has arrived and end what was aborted; False when the engine is to end."""
        mail = self.mailbox.collect()
        for request in mail.arrived:
            self.counters.requests += 1
            self.counters.prompt_tokens += len(request.prepared.tokens)
            for sequence in request.sequences:
                self.scheduler.add(sequence)
        for request in mail.aborted:
            if request in self.mailbox:
                self.counters.aborted += 1
                self._end(request)
        return not mail.closing

    # The step.

    def step(self) -> None:
        """Run one forward pass: schedule, encode, execute, emit."""
        step = self._schedule()
        if not (step or self._pictures):
            return
        try:
            self._encode(step)
            tokens = self._execute(step)
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._give_up(self._memory.shed(step, exc), exc)
        else:
            self._emit(tokens)

    def _schedule(self) -> Step:
        """Return what runs now, its rows in place; nothing when the memory for them is not there."""
        step = self.scheduler.schedule()
        try:
            self.runner.apply(self.scheduler.kv.take_ops())
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._give_up(self._memory.start_over(exc), exc)
            return Step()
        now = time.perf_counter()
        for chunk in step.prefill:
            request = request_of(chunk.sequence)
            request.scheduled = request.scheduled or now
        return step

    def _encode(self, step: Step) -> None:
        """Compute picture features; prompts whose pictures are not ready leave the step."""
        self._pictures.encode(step)
        self._pictures.encode_slice()
        self._last_token = time.monotonic()

    def _execute(self, step: Step) -> list[tuple[Sequence, Sampled]]:
        """Return the next token of each sequence whose tokens are all computed; keep complete prompts as prefixes."""
        if not step:
            return []
        sequences, logits = self.runner.forward(step)
        for sequence in step.decode:
            sequence.num_computed = len(sequence.tokens)
        for chunk in step.prefill:
            chunk.sequence.num_computed = chunk.end
        tokens = self._sample(sequences, logits)
        for chunk in step.prefill:
            if chunk.samples:
                self._save_prefix(chunk.sequence)
        self.counters.steps += 1
        self._last_token = time.monotonic()
        return tokens

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[Sequence, Sampled]]:
        if not sequences:
            return []
        matchers = [None if _output(sequence).in_reasoning else sequence.matcher for sequence in sequences]
        mask = self._grammars.mask(matchers, logits.device) if any(matchers) else None
        return list(zip(sequences, sampler.sample(logits, sequences, mask), strict=True))

    def _save_prefix(self, sequence: Sequence) -> None:
        prefixes = self.scheduler.prefixes
        if not prefixes.max_blocks or sequence.slot is None:
            return
        hashes = sequence.hashes.extend(sequence.tokens[: sequence.num_computed])
        pairs = prefixes.insert(hashes[: sequence.num_computed // BLOCK])
        self.runner.save(sequence, pairs, prefixes.reserved)

    def _emit(self, tokens: list[tuple[Sequence, Sampled]]) -> None:
        """Append each token, send its text, and end the sequences that end with it."""
        for sequence, sampled in tokens:
            # A token before this one may have ended the request.
            if sequence.status is SequenceStatus.RUNNING:
                try:
                    self._accept(sequence, sampled)
                except QvlError as exc:
                    self._fail(request_of(sequence), exc)

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        request, output = request_of(sequence), _output(sequence)
        now = time.perf_counter()
        request.first_token = request.first_token or now
        self.counters.generated_tokens += 1
        matcher = None if output.in_reasoning else sequence.matcher
        sequence.append(sampled.token)
        if matcher is not None:
            consume(matcher, sampled.token)
        if self._ends(sequence, sampled.token, guided=matcher is not None):
            reason: FinishReason | None = "stop"
        else:
            chunk = output.push(sampled)
            if chunk is not None:
                self.mailbox.send(request, chunk)
            stopped = output.stopped or (matcher is not None and matcher.is_stopped())
            reason = "stop" if stopped else "length" if sequence.remaining <= 0 else None
        if reason is not None:
            self._finish(sequence, reason, now)

    def _ends(self, sequence: Sequence, token: int, *, guided: bool) -> bool:
        """True if `token` is one that ends the answer and is not part of it."""
        sampling = sequence.sampling
        return token in sampling.stop_token_ids or (token in self._eos and (guided or not sampling.ignore_eos))

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        request, last = request_of(sequence), _output(sequence).finish(reason)
        # The newest token has no KV yet; everything before it can serve the next turn.
        try:
            self._save_prefix(sequence)
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._memory.release_caches(exc)
        self.scheduler.finish(sequence)
        request.num_finished += 1
        if request.done:
            last = replace(last, usage=request.usage(), timing=request.timing(now))
            self._end(request)
        self.mailbox.send(request, last)

    # Ends and faults.

    def _end(self, request: EngineRequest) -> None:
        """Forget a request and free all it holds."""
        for sequence in request.sequences:
            self.scheduler.finish(sequence)
        for picture in request.prepared.pictures:
            picture.features = picture.pixels = picture.encoding = None
        self.mailbox.discard(request)

    def _fail(self, request: EngineRequest, error: QvlError, cause: BaseException | None = None) -> None:
        if request not in self.mailbox:
            return
        error.__cause__ = cause
        self.counters.failed += 1
        log.info("request_failed", request_id=request.request_id, error=str(error))
        self._end(request)
        self.mailbox.send(request, error)

    def _fail_picture(self, request: EngineRequest, exc: Exception) -> None:
        if self._memory.explains(exc):
            self.counters.memory_errors += 1
            self._fail(request, memory_error("the pictures of this request"), exc)
        else:
            self._fail(request, BackendError(f"a picture could not be encoded: {first_line(exc)}"), exc)

    def _give_up(self, requests: list[EngineRequest], exc: Exception) -> None:
        for request in requests:
            self._fail(request, memory_error("this request"), exc)

    def _fail_all(self, error: Callable[[], QvlError]) -> None:
        for request in self.mailbox.requests():
            try:
                self._end(request)
            finally:
                self.mailbox.send(request, error())
        self.mailbox.flush()


def _output(sequence: Sequence) -> Detokenizer:
    return request_of(sequence).outputs[sequence.index]
