"""What a step gives the text model beside its tokens: sequences in decode, chunks of prompts, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl.backends.local.model.kv_storage import Storage
    from qvl.backends.local.model.linear import AdapterRows
    from qvl.backends.local.model.shared_rows import SharedRow


@dataclass(slots=True)
class DecodeGroup:
    """Sequences in decode whose KV rows lie in one pool: tokens first:first+count of the batch.

    Args:
        first: index of the group's first token in the batch.
        count: number of tokens, one per sequence.
        capacity: tokens that a row of the pool can hold.
        longest: keys that each token attends to, its own included; `visible` hides those that a row does not have.
        first_row: `num_rows` rows of the pool are read from here on.
        shared: the tokens also attend to rows that they share with others.
        rows: int64 [count] KV row of each token, or None when they are exactly those that are read, in order.
        write: int64 [count * kv heads] flat index of the newest key of each head.
        visible: int64 [num_rows], the number of visible keys of each row; None when every key is visible.
    """

    first: int
    count: int
    capacity: int
    longest: int
    first_row: int
    num_rows: int
    shared: bool
    rows: Tensor | None
    write: Tensor
    visible: Tensor | None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return [num_rows, 1, 1, longest], to add to the scores: 0 for a visible key, else -inf; None if all are."""
        import torch

        if self.visible is None:
            return None
        hidden = torch.arange(self.longest, device=self.visible.device) >= self.visible[:, None]
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]

    def to(self, device: torch.device) -> DecodeGroup:
        """Return the same on `device`."""
        return replace(
            self,
            rows=None if self.rows is None else self.rows.to(device),
            write=self.write.to(device),
            visible=None if self.visible is None else self.visible.to(device),
        )


@dataclass(slots=True)
class PromptChunk:
    """A prefill chunk: tokens first:first+count of the batch, at positions `start` and up of a KV row.

    `shared`: they also attend to rows that they share with others. Where the model has states, `read` and `write` are
    the sequence's before and behind it (`read` is None at a prompt's start), and `marks` are further ones to write,
    with how many of its tokens lie before each.
    """

    first: int
    count: int
    capacity: int
    row: int
    start: int
    shared: bool = False
    read: int | None = None
    write: int = 0
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class Deepstack:
    """Picture features to add after the first layers: [layers, n, hidden] for the tokens `where`, int64 [n]."""

    where: Tensor
    features: Tensor


@dataclass(slots=True)
class LayerStep:
    """The parts of a step that a layer needs beside its tokens, on its device; see `TextDecoder.forward`.

    `place` is the layer's number among those that keep the same kind of memory of tokens.
    """

    storage: Storage
    place: int
    groups: Sequence[DecodeGroup]
    chunks: Sequence[PromptChunk]
    masks: Sequence[Tensor | None]
    cos: Tensor
    sin: Tensor
    shared: Sequence[SharedRow]
    states: Tensor | None
    adapted: Sequence[AdapterRows] = ()


class StepAdapters(NamedTuple):
    """The tokens of a step that adapters change, and those of them whose hidden states are kept."""

    all: Sequence[AdapterRows] = ()
    kept: Sequence[AdapterRows] = ()

    def to(self, device: torch.device) -> StepAdapters:
        """Return the same on `device`."""
        both = [
            [part._replace(rows=None if part.rows is None else part.rows.to(device)) for part in parts]
            for parts in self
        ]
        return StepAdapters(*both)


NO_ADAPTERS: Final = StepAdapters()
