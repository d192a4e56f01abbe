"""The engine's loop in its own thread: every step schedules, encodes pictures, runs the model and sends text.

An error of one request ends that request; if the loop fails, all callers get an EngineDeadError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from qvl.backends.local.engine_request import Counters, EngineRequest, request_of
from qvl.backends.local.mailbox import Mailbox
from qvl.backends.local.model.sampler import Sampled, sample
from qvl.backends.local.out_of_memory import OutOfMemoryPolicy, memory_error
from qvl.backends.local.picture_encoder import PictureEncoder
from qvl.backends.local.scheduling.lookup import can_guess
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.backends.local.scheduling.step import Step
from qvl.backends.local.step_times import StepTimes
from qvl.backends.local.text.grammar import consume
from qvl.chunks import join
from qvl.errors import BackendError, BackendUnavailableError, EngineDeadError, QvlError, RequestError, first_line
from qvl.log import logger

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.text.detokenizer import Detokenizer
    from qvl.backends.local.text.grammar import Grammars, Matcher
    from qvl.types import Chunk, FinishReason

log = logger(__name__)


class Engine:
    """Runs requests in continuous batches until it is closed.

    Args:
        max_queue: most requests that wait for a KV row; more are refused.
        watchdog: seconds without a token, while sequences run, after which `unready` reports a hang.
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
        scheduler.recall = runner.recall
        self.counters = Counters()
        self.forces = True  # for measurements: False has every token take a step
        self.mailbox = Mailbox(scheduler.waiting, max_queue)
        self._grammars = grammars
        self._eos = frozenset(eos_token_ids)
        self._memory = OutOfMemoryPolicy(runner, scheduler, self.counters)
        self._pictures = PictureEncoder(runner, self._memory, scheduler.grain, self._fail_picture)
        self.times = StepTimes(scheduler.budget.costs, asynchronous=runner.device.asynchronous)
        self._last_token = time.monotonic()
        self._watchdog = watchdog
        self._stop_watching = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qvl-engine", daemon=True)
        self._guard = threading.Thread(target=self._watch, name="qvl-watchdog", daemon=True)

    def start(self) -> None:
        """Start the engine's thread and the watchdog's."""
        self._thread.start()
        self._guard.start()

    def close(self, timeout: float = 10.0) -> None:
        """End the loop after the current step; callers that wait get BackendUnavailableError."""
        self.mailbox.close()
        self._stop_watching.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def unready(self) -> str | None:
        """Return the reason why the engine is dead or seems to hang, or None if it is ready."""
        error = self.mailbox.error
        return self._stalled() if error is None else str(error)

    def _stalled(self) -> str | None:
        quiet = time.monotonic() - max(self._last_token, self.mailbox.busy_since)
        if len(self.mailbox) and quiet > self._watchdog:
            return f"{len(self.scheduler.running)} requests running, no token for {quiet:.0f} s"
        return None

    def stats(self) -> Mapping[str, float]:
        """Return the counters and times so far, and the numbers of sequences, tokens and bytes at present."""
        runner, scheduler = self.runner, self.scheduler
        features, kv, prefixes = runner.features, scheduler.kv, scheduler.prefixes
        return {
            **asdict(self.counters),
            **self.times.stats(scheduler),
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "num_preemptions": scheduler.num_preemptions,
            "kv_budget_tokens": kv.budget,
            "kv_cache_usage_perc": kv.reserved / max(1, kv.budget),
            "kv_reserved_tokens": kv.reserved,
            "kv_used_tokens": kv.allocated_tokens - prefixes.idle_tokens,
            "kv_slots": kv.num_slots - prefixes.num_idle,
            "kv_bytes": runner.storage.num_bytes,
            "prefixes": len(prefixes),
            "prefix_tokens": prefixes.num_tokens,
            "prefix_hit_tokens": prefixes.hit_tokens,
            "prefix_evictions": prefixes.evictions,
            "vision_cache_bytes": features.num_bytes,
            "vision_cache_hits": features.hits,
            "vision_cache_misses": features.misses,
            "pictures_encoded": runner.num_encoded,
            "graph_replays": runner.graphs.num_replays if runner.graphs is not None else 0,
        }

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
        """Queue new requests and end aborted ones; return False if the engine is to close."""
        mail = self.mailbox.collect()
        for request in mail.arrived:
            self.counters.requests += 1
            self.counters.prompt_tokens += len(request.prepared.tokens)
            for sequence in request.sequences:
                self.scheduler.add(sequence)
            self._open(request)
        for request in mail.aborted:
            if request in self.mailbox:
                self.counters.aborted += 1
                self._end(request)
        return not mail.closing

    # The step.

    def step(self) -> None:
        """Run slices of pictures and one forward pass: schedule, encode, execute, emit."""
        self.times.start()
        step = self._schedule()
        if not step:
            return
        try:
            self._encode(step)
            tokens = self._execute(step)
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._give_up(self._memory.shed(step, exc), exc)
        else:
            self._emit(tokens, _drafts(step))
            self.times.end(self.scheduler.work(step), sampled=bool(tokens))

    def _schedule(self) -> Step:
        """Return the next step with its KV rows allocated on the device; an empty step if memory is short."""
        step = self.scheduler.schedule()
        try:
            self.runner.apply(self.scheduler.kv.take_ops())
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._give_up(self._memory.start_over(exc), exc)
            return Step()
        now = time.perf_counter()
        begun = [chunk.sequence for chunk in step.prefill] + [part.sequence for part in step.pictures]
        for request in map(request_of, begun):
            request.scheduled = request.scheduled or now
        return step

    def _encode(self, step: Step) -> None:
        """Compute the step's slices of pictures."""
        if step.pictures:
            self.times.pictures(self._pictures.encode(step))
            self._last_token = time.monotonic()

    def _execute(self, step: Step) -> dict[Sequence, list[Sampled]]:
        """Return the sampled tokens of each sequence that is fully computed."""
        if not (step.decode or step.prefill):
            return {}
        sequences, logits = self.runner.forward(step)
        tokens = self._sample(sequences, logits, _drafts(step))
        self.scheduler.commit(step)
        self.counters.steps += 1
        self._last_token = time.monotonic()
        return tokens

    def _sample(
        self, sequences: list[Sequence], logits: Tensor, drafts: Mapping[Sequence, tuple[int, ...]]
    ) -> dict[Sequence, list[Sampled]]:
        tokens: dict[Sequence, list[Sampled]] = {sequence: [] for sequence in sequences}
        if not sequences:
            return tokens
        # A sequence with guesses has a row for each of them behind its own.
        matchers = [
            matcher
            for sequence in tokens
            for matcher in self._grammars.ahead(_guide(sequence), drafts.get(sequence, ()))
        ]
        mask = self._grammars.mask(matchers, logits.device) if any(matchers) else None
        for sequence, sampled in zip(sequences, sample(logits, sequences, mask), strict=True):
            tokens[sequence].append(sampled)
        return tokens

    def _emit(self, tokens: dict[Sequence, list[Sampled]], drafts: dict[Sequence, tuple[int, ...]]) -> None:
        """Append the tokens of each sequence, send their text, and end the sequences that end with them."""
        for sequence, sampled in tokens.items():
            # A token before this one may have ended the request.
            if sequence.status is SequenceStatus.RUNNING:
                try:
                    self._accept(sequence, sampled, drafts.get(sequence, ()))
                except QvlError as exc:
                    self._fail(request_of(sequence), exc)

    def _open(self, request: EngineRequest) -> None:
        """Have an answer begin with what its grammar forces; that is computed with the prompt, and sent after it."""
        scored = any(sequence.scores is not None for sequence in request.sequences)
        try:
            for sequence in request.sequences:
                reason = self._force(sequence)
                if scored:
                    # A prompt whose tokens are scored is computed in any case, and its scores come first.
                    sequence.ending = reason
                elif reason is not None:
                    self._finish(sequence, reason, time.perf_counter())
        except QvlError as exc:
            self._fail(request, exc)

    def _accept(self, sequence: Sequence, sampled: list[Sampled], draft: tuple[int, ...]) -> None:
        """Take the first of `sampled`, and each that follows a token which was guessed rightly."""
        now = time.perf_counter()
        if sequence.ending is not None:
            self._finish(sequence, sequence.ending, now)
            return
        reason: FinishReason | None = None
        right = 0
        while reason is None and right <= len(draft):
            known = len(sequence.tokens)
            reason = self._append(sequence, sampled[right]) or self._force(sequence)
            written = sequence.tokens[known:]
            guessed = _agreeing(written, draft[right:])
            right += guessed
            if reason is None:
                sequence.num_computed += guessed
            if guessed < len(written):
                break
        if draft:
            self.counters.drafted_tokens += len(draft)
            self.counters.accepted_tokens += right
            if sequence.lookup is not None:
                sequence.lookup.learn(len(draft), right)
        if reason is None:
            self._send_pieces(sequence, now)
        else:
            self._finish(sequence, reason, now)

    def _force(self, sequence: Sequence) -> FinishReason | None:
        """Append the tokens that the grammar leaves no choice about; return why the answer ends with them, or None."""
        reason = self._close_thought(sequence) if sequence.thought is not None else None
        # Rules about single tokens are the sampler's.
        matcher = _guide(sequence) if self.forces and sequence.rules is None else None
        while matcher is not None and reason is None and (tokens := self._grammars.forced(matcher)):
            for token in tokens:
                self.counters.forced_tokens += 1
                reason = self._append(
                    sequence, Sampled(token, 0.0, ((token, 0.0),) if sequence.sampling.logprobs else ())
                )
                if reason is not None:
                    break
        if matcher is not None and reason is None and self.scheduler.draft_rows and can_guess(sequence.sampling):
            sequence.expected = self._grammars.probable(matcher)
        return reason

    def _close_thought(self, sequence: Sequence) -> FinishReason | None:
        """End a thought that has had its tokens, with the closing words; return as `_force`."""
        thought = sequence.thought
        if thought is None or not _output(sequence).in_reasoning or not thought.spent(sequence.num_output):
            return None
        sequence.thought = None
        for token in thought.closing:
            self.counters.forced_tokens += 1
            reason = self._append(sequence, Sampled(token))
            if reason is not None:
                return reason
        return None

    def _append(self, sequence: Sequence, sampled: Sampled) -> FinishReason | None:
        """Append a token and note its text; return why the answer ends with it, or None."""
        request, output, matcher = request_of(sequence), _output(sequence), _guide(sequence)
        if sampled.token < 0:
            raise RequestError(
                "no token may come next: the allowed tokens, bad words and the response format exclude each other",
                hint="leave one of them out",
                param="allowed_token_ids" if sequence.sampling.allowed_token_ids else "bad_words",
            )
        self.counters.generated_tokens += 1
        sequence.append(sampled.token)
        if matcher is not None:
            consume(matcher, sampled.token)
        ends = self._ends(sequence, sampled.token, guided=matcher is not None)
        chunk = output.end(sampled) if ends else output.push(sampled)
        if chunk is not None:
            request.pieces[sequence.index].append(chunk)
        stopped = ends or output.stopped or (matcher is not None and matcher.is_stopped())
        return "stop" if stopped else "length" if sequence.remaining <= 0 else None

    def _send_pieces(self, sequence: Sequence, now: float) -> None:
        """Send what was written since the last step as one chunk."""
        request = request_of(sequence)
        request.first_token = request.first_token or now
        pieces = request.pieces.pop(sequence.index, None)
        if pieces:
            self._send(request, join(pieces))

    def _send(self, request: EngineRequest, chunk: Chunk) -> None:
        """Send a chunk; the first one tells how long the prompt is, and of its tokens where that is wanted."""
        if not request.begun:
            request.begun = True
            facts = None if request.facts is None else request.facts(request)
            chunk = replace(chunk, prompt=facts, prompt_usage=request.usage().of_prompt)
        self.mailbox.send(request, chunk)

    def _ends(self, sequence: Sequence, token: int, *, guided: bool) -> bool:
        """True if `token` is an EOS or stop token, which ends the answer and is not part of it."""
        sampling = sequence.sampling
        return token in sampling.stop_token_ids or (token in self._eos and (guided or not sampling.ignore_eos))

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        self._send_pieces(sequence, now)
        request, last = request_of(sequence), _output(sequence).finish(reason)
        self.scheduler.finish(sequence)
        request.num_finished += 1
        if request.done:
            last = replace(last, usage=request.usage(), timing=request.timing(now))
        # In this order: whoever has ended is told of no fault any more.
        self._send(request, last)
        if request.done:
            self._end(request)

    # Ends and faults.

    def _end(self, request: EngineRequest) -> None:
        """Remove a request and free its KV rows."""
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


def _guide(sequence: Sequence) -> Matcher | None:
    """Return the grammar that decides about the next token; thoughts are free."""
    return None if _output(sequence).in_reasoning else sequence.matcher


def _output(sequence: Sequence) -> Detokenizer:
    return request_of(sequence).outputs[sequence.index]


def _drafts(step: Step) -> dict[Sequence, tuple[int, ...]]:
    return {chunk.sequence: chunk.draft for chunk in step.prefill if chunk.draft}


def _agreeing(tokens: list[int], guesses: tuple[int, ...]) -> int:
    """Return how many of the first tokens were guessed."""
    pairs = enumerate(zip(tokens, guesses, strict=False))
    return next((at for at, (token, guess) in pairs if token != guess), min(len(tokens), len(guesses)))
