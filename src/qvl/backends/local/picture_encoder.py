"""Encodes the slices of pictures that a step contains, before its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qvl.backends.local.engine_request import EngineRequest, request_of
from qvl.backends.local.scheduling.sequence import SequenceStatus

if TYPE_CHECKING:
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.out_of_memory import OutOfMemoryPolicy
    from qvl.backends.local.scheduling.step import Step


class PictureEncoder:
    """Encodes the pictures of a step; a picture that fails ends only its own request.

    Args:
        grain: largest cost of one piece of the encoding, in tokens of a prompt.
        fail: ends a request whose picture failed.
    """

    def __init__(
        self, runner: Runner, memory: OutOfMemoryPolicy, grain: float, fail: Callable[[EngineRequest, Exception], None]
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._grain = grain
        self._fail = fail

    def encode(self, step: Step) -> float:
        """Encode the step's slices of pictures; return their cost, in tokens of a prompt."""
        spent = 0.0
        for part in step.pictures:
            if part.sequence.status is not SequenceStatus.WAITING:
                continue
            try:
                spent += self._runner.encode(part.sequence.prepared.pictures, part.units, self._grain)
            except Exception as exc:  # noqa: BLE001 - the fault of one picture
                if self._memory.explains(exc):
                    self._memory.release_caches(exc)
                    part.sequence.memory_errors += 1
                    if part.sequence.memory_errors == 1:
                        continue  # once more from the start, with the memory that the caches had
                self._fail(request_of(part.sequence), exc)
        return spent
