"""The loop of OpenVINO's continuous batching: one thread takes its steps and hands out the tokens of each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from qvl.backends.openvino.library import crossing, one_line
from qvl.errors import BackendError, BackendUnavailableError, DeviceMemoryError, EngineDeadError, QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from qvl.types import FinishReason

log = logger("qvl.backends.openvino")
# Steps after which the library must have let go of what was cancelled.
LAST_STEPS: Final = 32


class GenerationOutput(Protocol):
    """openvino_genai's GenerationOutput: what came for one sequence."""

    generated_ids: Sequence[int]
    generated_log_probs: Sequence[float]
    finish_reason: object


class GenerationHandle(Protocol):
    """openvino_genai's GenerationHandle."""

    def can_read(self) -> bool: ...
    def cancel(self) -> None: ...
    def get_status(self) -> object: ...
    def read(self) -> Mapping[int, GenerationOutput]: ...


class ContinuousBatching(Protocol):
    """openvino_genai's ContinuousBatchingPipeline."""

    def add_request(
        self, request_id: int, prompt: str, images: Sequence[object], generation_config: object
    ) -> GenerationHandle: ...
    def has_non_finished_requests(self) -> bool: ...
    def step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one step made for a sequence, their logprobs, and why it ended, if it did."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None


Deliver = Callable[["Piece | QvlError"], None]


class StepLoop:
    """Steps a pipeline as long as it has requests. `add` and `cancel` may be called from any thread."""

    def __init__(self, pipeline: ContinuousBatching) -> None:
        self._pipeline: ContinuousBatching | None = pipeline
        self._ids = itertools.count(1)
        self._running: dict[int, tuple[GenerationHandle, Deliver]] = {}
        self._changed = threading.Condition()
        # The library keeps what it reads of one prompt in the pipeline: two must not be added at once.
        self._adding = threading.Lock()
        self._closing = False
        self._dead: QvlError | None = None
        self._thread = threading.Thread(target=self._run, name="qvl-openvino", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def dead(self) -> bool:
        return self._dead is not None

    def add(self, prompt: str, images: Sequence[object], config: object, deliver: Deliver) -> int:
        """Start a request and return its number; blocks while its pictures are encoded, which runs beside the steps.

        `deliver` is called in the loop's thread with each piece, the last of which has a finish_reason, or an error.
        """
        with self._adding:
            pipeline, number = self._alive(), next(self._ids)
            with crossing():
                handle = pipeline.add_request(number, prompt, images, config)
        with self._changed:
            if self._dead is not None or self._closing:
                handle.cancel()
            self._alive()
            self._running[number] = (handle, deliver)
            self._changed.notify()
        return number

    def cancel(self, number: int) -> None:
        """End a request whose answer nobody reads any more; its memory is free after the next step."""
        with self._changed:
            entry = self._running.pop(number, None)
            if entry is not None:
                entry[0].cancel()
                self._changed.notify()

    def close(self) -> None:
        """End all requests with an error, then the thread. Blocks for the step in progress."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _alive(self) -> ContinuousBatching:
        if self._dead is not None:
            raise self._dead
        if self._closing or self._pipeline is None:
            raise BackendUnavailableError("OpenVINO was closed while a request was running")
        return self._pipeline

    def _run(self) -> None:
        pipeline = self._pipeline
        assert pipeline is not None
        try:
            while self._wait(pipeline):
                pipeline.step()
                self._hand_out()
            self._end(BackendUnavailableError("OpenVINO was closed while a request was running"))
            for _ in range(LAST_STEPS):
                if not pipeline.has_non_finished_requests():
                    break
                pipeline.step()
        except Exception as exc:  # noqa: BLE001 - told to everybody who waits
            # The library cannot go on after a step that failed: it says so of every later one.
            self._dead = EngineDeadError(f"OpenVINO's pipeline failed: {one_line(exc)}", hint="restart")
            log.error("openvino_dead", error=one_line(exc))
            self._end(self._dead)
        self._pipeline = None

    def _wait(self, pipeline: ContinuousBatching) -> bool:
        """Return True when there is a step to take, False when the loop shall end."""
        with self._changed:
            while not self._closing and not pipeline.has_non_finished_requests():
                # A request may be in the pipeline before it is noted here.
                self._changed.wait(None if not self._running else 0.01)
                self._hand_out()
            return not self._closing

    def _hand_out(self) -> None:
        with self._changed:
            entries = list(self._running.items())
        for number, (handle, deliver) in entries:
            last = self._read(handle, deliver)
            if last:
                with self._changed:
                    self._running.pop(number, None)

    def _read(self, handle: GenerationHandle, deliver: Deliver) -> bool:
        """Deliver what came for one request; return True if that was the last of it."""
        # Asked first: what is read afterwards is then all of it.
        status = str(handle.get_status()).rpartition(".")[2]
        while handle.can_read():
            for output in handle.read().values():
                word = str(output.finish_reason).rpartition(".")[2]
                reason: FinishReason | None = "stop" if word == "STOP" else "length" if word == "LENGTH" else None
                deliver(Piece(list(output.generated_ids), list(output.generated_log_probs), reason))
                if reason is not None:
                    return True
        if status == "RUNNING":
            return False
        if status == "IGNORED":
            deliver(DeviceMemoryError("the memory for OpenVINO's KV cache does not suffice", hint="see kv_cache_bytes"))
        else:
            deliver(BackendError(f"OpenVINO ended the answer early, with status {status}"))
        return True

    def _end(self, error: QvlError) -> None:
        with self._changed:
            entries = list(self._running.values())
            self._running.clear()
        for handle, deliver in entries:
            handle.cancel()
            deliver(error)
