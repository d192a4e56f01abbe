"""Records decode steps and replays them (CUDA graphs, and NPU graphs, whose interface is the same).

A decode step of a small batch is hundreds of short operators, and queueing them takes a GPU's host longer than the GPU
takes to run them. A recording has fixed shapes and fixed addresses: sequences are padded to a few batch sizes by
repeating one of them (which writes the same keys again), lengths to steps of their pool, and a recording is dropped
when the memory of its pool moves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.errors import first_line
from qvl.log import logger

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.model.device import Device, Graph
    from qvl.backends.local.model.step_inputs import StepInputs, StepShape

log = logger(__name__)

WORTH: Final = 4  # recording costs about as much as this many steps
KEPT: Final = 32


def padded_count(count: int) -> int:
    """Return `count` rounded up to a recorded batch size: 1, 2, 4, 8, 16, 24, 32 ..."""
    return 1 << (count - 1).bit_length() if count < 8 else -(-count // 8) * 8


def padded_length(length: int, capacity: int) -> int:
    step = max(64, capacity // 8)
    return min(-(-length // step) * step, capacity)


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: StepInputs
    graph: Graph
    logits: Tensor


class DecodeGraphs:
    """Runs padded decode steps: replays the recording of their shapes, or makes one.

    Args:
        compute: the step to record: returns logits [n, vocabulary], using operators on the device alone.
    """

    def __init__(self, device: Device, compute: Callable[[StepInputs], Tensor]) -> None:
        self._device = device
        self._compute = compute
        self._recordings: OrderedDict[StepShape, _Recording] = OrderedDict()
        self._counts: Counter[StepShape] = Counter()
        self._pool: object = None
        self._broken = False
        self.num_replays = 0

    def run(self, inputs: StepInputs) -> Tensor:
        """Return logits [n, vocabulary], valid until the next call."""
        key = inputs.shape
        recording = self._recordings.get(key)
        if recording is None:
            self._counts[key] += 1
            if self._broken or self._counts[key] <= WORTH:
                return self._compute(inputs)
            recording = self._record(key, inputs)
            if recording is None:
                return self._compute(inputs)
        self._recordings.move_to_end(key)
        recording.inputs.packed.copy_(inputs.packed)
        recording.graph.replay()
        self.num_replays += 1
        return recording.logits

    def forget(self, capacities: Collection[int]) -> None:
        """Drop the recordings that read pools of these capacities, whose memory moved."""
        for key in [key for key in self._recordings if any(group.capacity in capacities for group in key.groups)]:
            del self._recordings[key], self._counts[key]

    def clear(self) -> None:
        """Drop all recordings and free their memory."""
        self._recordings.clear()
        self._counts.clear()
        self._pool = None

    def _record(self, key: StepShape, inputs: StepInputs) -> _Recording | None:
        inputs = inputs.clone()
        try:
            # Once outside: what operators do on first use must not be part of the recording.
            self._compute(inputs)
            graph, logits = self._device.record(lambda: self._compute(inputs), self._pool)
        except Exception as exc:
            if self._device.is_out_of_memory(exc):
                raise
            self._broken = True
            log.warning("decode_graphs_off", error=first_line(exc))
            return None
        self._pool = graph.pool()
        made = self._recordings[key] = _Recording(inputs, graph, logits)
        if len(self._recordings) > KEPT:
            self._recordings.popitem(last=False)
        return made
