"""The decode step recorded once and replayed (CUDA graphs, and NPU graphs, whose interface is the same).

A decode step of a small batch is hundreds of short operators, and queueing them takes a GPU's host longer than the GPU
takes to run them. A recording has fixed shapes and fixed addresses: sequences are padded to a few batch sizes by
repeating one of them (which writes the same keys to the same place again), lengths to steps of their pool, and a
recording is dropped when the memory of its pool moves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.errors import first_line
from qvl.log import logger

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.model.decoder import DecodeGroup
    from qvl.backends.local.model.device import Device, Graph

log = logger(__name__)

WORTH: Final = 4  # recording costs about as much as this many steps
KEPT: Final = 32

Key: TypeAlias = tuple[tuple[int, int, int, int], ...]


def padded_count(count: int) -> int:
    """Return 1, 2, 4, 8, 16, 24, 32 ...: sizes of which there are few and that waste little."""
    return 1 << (count - 1).bit_length() if count < 8 else -(-count // 8) * 8


def padded_length(length: int, capacity: int) -> int:
    step = max(64, capacity // 8)
    return min(-(-length // step) * step, capacity)


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """A decode step: token ids [n], positions [3, n], and where their keys lie."""

    ids: Tensor
    positions: Tensor
    groups: list[DecodeGroup]

    @property
    def key(self) -> Key:
        """Return what must be equal for a recording to serve."""
        return tuple((group.capacity, group.count, group.num_rows, group.longest) for group in self.groups)

    def tensors(self) -> list[Tensor]:
        of_groups = [t for group in self.groups for t in (group.rows, group.write, group.mask) if t is not None]
        return [self.ids, self.positions, *of_groups]

    def clone(self) -> DecodeInputs:
        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        groups = [
            replace(group, rows=copy(group.rows), write=group.write.clone(), mask=copy(group.mask))
            for group in self.groups
        ]
        return DecodeInputs(self.ids.clone(), self.positions.clone(), groups)


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: DecodeInputs
    graph: Graph
    logits: Tensor


class DecodeGraphs:
    """Runs padded decode steps, from a recording where there is one.

    Args:
        compute: the step itself: logits [n, vocabulary] of its inputs, by operators on the device alone.
    """

    def __init__(self, device: Device, compute: Callable[[DecodeInputs], Tensor]) -> None:
        self._device = device
        self._compute = compute
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()
        self._counts: Counter[Key] = Counter()
        self._pool: object = None
        self._broken = False
        self.num_replays = 0

    def run(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [n, vocabulary], valid until the next call."""
        key = inputs.key
        recording = self._recordings.get(key)
        if recording is None:
            self._counts[key] += 1
            if self._broken or self._counts[key] <= WORTH:
                return self._compute(inputs)
            recording = self._record(key, inputs)
            if recording is None:
                return self._compute(inputs)
        self._recordings.move_to_end(key)
        for target, source in zip(recording.inputs.tensors(), inputs.tensors(), strict=True):
            target.copy_(source)
        recording.graph.replay()
        self.num_replays += 1
        return recording.logits

    def forget(self, capacities: Collection[int]) -> None:
        """Drop the recordings of these capacities, whose pools have moved."""
        for key in [key for key in self._recordings if any(group[0] in capacities for group in key)]:
            del self._recordings[key], self._counts[key]

    def clear(self) -> None:
        """Give back what recordings hold."""
        self._recordings.clear()
        self._counts.clear()
        self._pool = None

    def _record(self, key: Key, inputs: DecodeInputs) -> _Recording | None:
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
