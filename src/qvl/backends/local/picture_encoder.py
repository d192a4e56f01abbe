"""Sees to it that the pictures of a step have features; a large one is encoded in slices, between the others' steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qvl.backends.local.engine_request import EngineRequest, request_of
from qvl.backends.local.scheduling.sequence import SequenceStatus

if TYPE_CHECKING:
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.out_of_memory import OutOfMemoryPolicy
    from qvl.backends.local.scheduling.scheduler import ScheduledTokens, Step
    from qvl.backends.local.text.processor import PreparedPicture


class PictureEncoder:
    """Encodes the pictures of a step; the failure of a picture is its request's alone.

    Args:
        tokens: a picture that costs more than so many tokens of text is large; a slice of it costs about as much.
        fail: ends a request whose picture failed.
    """

    def __init__(
        self, runner: Runner, memory: OutOfMemoryPolicy, tokens: int, fail: Callable[[EngineRequest, Exception], None]
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._tokens = tokens
        self._fail = fail
        self._large: deque[tuple[EngineRequest, PreparedPicture]] = deque()

    def __bool__(self) -> bool:
        """True while a large picture is being encoded."""
        while self._large and self._large[0][1].encoding is None:
            self._large.popleft()  # done, or its request has ended
        return bool(self._large)

    def encode(self, step: Step) -> None:
        """Encode the step's pictures. A prompt that comes to a large one is taken out and waits before it."""
        for chunk in step.prefill:
            if chunk.sequence.status is SequenceStatus.RUNNING:
                request = request_of(chunk.sequence)
                with self._failing(request):
                    self._large.extend((request, picture) for picture in self._encode(chunk))
        # A request that failed has left with all its choices.
        step.decode = [sequence for sequence in step.decode if sequence.status is SequenceStatus.RUNNING]
        running = [chunk for chunk in step.prefill if chunk.sequence.status is SequenceStatus.RUNNING]
        step.prefill = [chunk for chunk in running if chunk.end <= chunk.sequence.ready]

    def encode_slice(self) -> None:
        """Encode one slice of the first large picture."""
        if self:
            request, picture = self._large[0]
            with self._failing(request):
                self._runner.encode_slice(picture)

    def _encode(self, chunk: ScheduledTokens) -> list[PreparedPicture]:
        try:
            return self._runner.encode(chunk, self._tokens)
        except Exception as exc:  # noqa: BLE001 - raised again where it is not the memory
            self._memory.release_caches(exc)
            return self._runner.encode(chunk, self._tokens)

    @contextmanager
    def _failing(self, request: EngineRequest) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - the fault of one picture
            if self._memory.explains(exc):
                self._memory.release_caches(exc)
            self._fail(request, exc)
