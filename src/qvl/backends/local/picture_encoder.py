"""Sees to it that the pictures of a step have features; a large one is encoded in slices, between the others' steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qvl.backends.local.scheduling.sequence import SequenceStatus

if TYPE_CHECKING:
    from qvl.backends.local.engine_request import EngineRequest
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.scheduling.scheduler import ScheduledTokens, Step
    from qvl.backends.local.text.processor import PreparedPicture


class Pictures:
    """What the engine does about pictures.

    Args:
        tokens: a picture that costs more than so many tokens of text is large; a slice of it costs about as much.
        release: gives all caches' memory back to the device.
        fail: ends a request whose picture failed.
    """

    def __init__(
        self, runner: Runner, tokens: int, release: Callable[[], None], fail: Callable[[EngineRequest, Exception], None]
    ) -> None:
        self._runner = runner
        self._tokens = tokens
        self._release = release
        self._fail = fail
        self._large: deque[tuple[EngineRequest, PreparedPicture]] = deque()

    def __bool__(self) -> bool:
        """Whether a large picture is at work."""
        while self._large and self._large[0][1].encoding is None:
            self._large.popleft()  # done, or its request has ended
        return bool(self._large)

    def encode(self, step: Step) -> None:
        """Encodes the step's pictures. A prompt that comes to a large one is taken out and waits before it."""
        for chunk in step.prefill:
            if chunk.sequence.status is SequenceStatus.RUNNING:
                begun = self._attempt(chunk.sequence.group, partial(self._encode, chunk))
                self._large.extend((chunk.sequence.group, picture) for picture in begun or ())
        # A request that failed has left with all its choices.
        step.decode = [sequence for sequence in step.decode if sequence.status is SequenceStatus.RUNNING]
        running = [chunk for chunk in step.prefill if chunk.sequence.status is SequenceStatus.RUNNING]
        step.prefill = [chunk for chunk in running if chunk.end <= chunk.sequence.ready]

    def encode_slice(self) -> None:
        """One slice of the first large picture."""
        if self:
            job, picture = self._large[0]
            self._attempt(job, partial(self._runner.encode_slice, picture))

    def _encode(self, chunk: ScheduledTokens) -> list[PreparedPicture]:
        try:
            return self._runner.encode(chunk, self._tokens)
        except Exception as exc:
            if not self._runner.device.is_out_of_memory(exc):
                raise
            self._release()
            return self._runner.encode(chunk, self._tokens)

    def _attempt(self, job: EngineRequest, encode: Callable[[], Any]) -> Any:
        """What `encode` returns; when it fails, it is this request that fails."""
        try:
            return encode()
        except Exception as exc:  # noqa: BLE001 - the fault of one picture
            if self._runner.device.is_out_of_memory(exc):
                self._release()
            self._fail(job, exc)
            return None
