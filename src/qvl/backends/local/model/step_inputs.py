"""The integers of a step: token ids, positions, and where keys lie; gathered on the host, sent in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qvl.backends.local.model.decoder_step import DecodeGroup, StepAdapters
from qvl.backends.local.model.device import to_device
from qvl.backends.local.model.linear import AdapterRows

if TYPE_CHECKING:
    from collections.abc import Sequence as ListLike

    import torch
    from numpy.typing import NDArray
    from torch import Tensor


class GroupShape(NamedTuple):
    """A `DecodeGroup` without its tensors; `whole` where it has no `rows`, `full` where it has no `visible`."""

    first: int
    num_tokens: int
    capacity: int
    longest: int
    first_row: int
    num_rows: int
    shared: bool
    whole: bool
    full: bool


class GroupPlan(NamedTuple):
    """A `DecodeGroup` on the host."""

    shape: GroupShape
    rows: NDArray[np.int64]
    write: NDArray[np.int64]
    visible: NDArray[np.int64]


class StepShape(NamedTuple):
    """The properties of a step that must equal those of a recording for it to be replayed.

    Args:
        tokens: all of the step.
        kept: tokens whose hidden state leaves the last layer; None for all.
        pictured: how many are parts of pictures.
        heads: key heads.
        groups: those that decode.
        states: sequences that decode and have a state.
        adapted: adapters, and how many tokens each changes; None for all. `adapted_kept`: of the kept ones.
    """

    tokens: int
    kept: int | None
    pictured: int
    heads: int
    groups: tuple[GroupShape, ...]
    states: int = 0
    adapted: tuple[tuple[int, int | None], ...] = ()
    adapted_kept: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's integers on the device, int64 in one tensor: `packed`."""

    shape: StepShape
    packed: Tensor
    ids: Tensor
    positions: Tensor
    kept: Tensor | None
    pictured: Tensor
    groups: list[DecodeGroup]
    states: Tensor | None
    adapted: StepAdapters

    @classmethod
    def of(cls, shape: StepShape, packed: Tensor) -> StepInputs:
        """Return the parts of `packed`, which are views of it."""
        import torch

        sizes = [shape.tokens, 3 * shape.tokens, shape.kept or 0, shape.pictured, 2 * shape.states]
        changed = (*shape.adapted, *shape.adapted_kept)
        sizes += [count or 0 for _, count in changed]
        for group in shape.groups:
            sizes += [0 if group.whole else group.num_tokens, group.num_tokens * shape.heads]
            sizes.append(0 if group.full else group.num_rows)
        ids, positions, kept, pictured, states, *parts = torch.split(packed, sizes)
        adapted = [
            AdapterRows(number, None if count is None else rows)
            for (number, count), rows in zip(changed, parts[: len(changed)], strict=True)
        ]
        everywhere, parts = len(shape.adapted), parts[len(changed) :]
        groups = []
        for group, where, write, counts in zip(shape.groups, parts[::3], parts[1::3], parts[2::3], strict=True):
            rows, visible = None if group.whole else where, None if group.full else counts
            groups.append(DecodeGroup(*group[:7], rows, write, visible))
        some = None if shape.kept is None else kept
        both = states.view(2, -1) if shape.states else None
        adapters = StepAdapters(adapted[:everywhere], adapted[everywhere:])
        return cls(shape, packed, ids, positions.view(3, -1), some, pictured, groups, both, adapters)

    def clone(self) -> StepInputs:
        """Return the same in memory of its own."""
        return self.of(self.shape, self.packed.clone())


def send(
    ids: ListLike[int],
    positions: ListLike[NDArray[np.int64]],
    groups: ListLike[GroupPlan],
    heads: int,
    device: torch.device,
    *,
    kept: ListLike[int] | None = None,
    pictured: ListLike[NDArray[np.int64]] = (),
    states: ListLike[tuple[int, int]] = (),
    adapters: ListLike[int] = (),
) -> StepInputs:
    """Return the inputs on `device`.

    Args:
        ids: of all tokens.
        positions: int64 [3, n] each; together of all tokens.
        kept: see `StepShape`; None for all.
        pictured: indices of tokens that are parts of pictures.
        states: (read, written) of each sequence in decode, where the model has states.
        adapters: of each token, 0 for none; nothing if no token has one.
    """
    joined = np.concatenate(positions, axis=1)
    parts = [np.array(ids, dtype=np.int64), joined.reshape(-1), np.array(kept or (), dtype=np.int64), *pictured]
    parts.append(np.array(states, dtype=np.int64).T.reshape(-1))
    numbers = np.array(adapters, dtype=np.int64)
    changed = [_rows_by_adapter(some) for some in (numbers, numbers if kept is None or not adapters else numbers[kept])]
    parts += [rows for some in changed for _, rows in some if rows is not None]
    for group in groups:
        parts += [group.rows, group.write, group.visible]
    num_pictured = sum(map(len, pictured))
    shape = StepShape(
        len(ids),
        None if kept is None else len(kept),
        num_pictured,
        heads,
        tuple(group.shape for group in groups),
        len(states),
        *(tuple((number, None if rows is None else len(rows)) for number, rows in some) for some in changed),
    )
    return StepInputs.of(shape, to_device(np.concatenate(parts), device))


def _rows_by_adapter(numbers: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64] | None]]:
    """Return each adapter with its rows, None where all are; `numbers` has the adapter of each row, 0 for none."""
    found: list[tuple[int, NDArray[np.int64] | None]] = []
    for number in np.unique(numbers[numbers > 0]):
        rows = np.flatnonzero(numbers == number)
        found.append((int(number), rows if len(rows) < len(numbers) else None))
    return found
