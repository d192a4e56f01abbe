"""Conversion of dialogues to token rows and padded batches, with positions and masks like those of Qwen3-VL.

A parallel dialogue is one row: its opening (system prompt and pictures) is shared, and every question with its answer
is a branch that attends only to the opening and itself, at the positions it would have alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from training.network import token_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from training.tasks import Dialogue, Turn

IGNORED: Final = -100

Grid = tuple[int, int]


@dataclass(slots=True)
class TrainingRow:
    """Tokens, each with its target token (or IGNORED), its branch (0 is shared) and its three positions."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: ids and targets [rows, length], positions [3, rows, length], mask [rows, 1, length, length]."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    pictures: list[int]


class RowWriter:
    """Writes rows with one tokenizer; `encode` maps a text to ids and is called once for each distinct text."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._known: dict[str, list[int]] = {}
        self._start, self._end = token_id("<|im_start|>"), token_id("<|im_end|>")
        self._image = token_id("<|image_pad|>")
        self._vision = token_id("<|vision_start|>"), token_id("<|vision_end|>")

    def write(self, dialogue: Dialogue, grids: Sequence[Grid]) -> TrainingRow:
        """Return the row of a dialogue; `grids` are (rows, columns) of merged tokens of every picture in the pool."""
        row, cursor = TrainingRow(), 0
        if dialogue.system is not None:
            cursor = self._add(row, [self._start, *self._text("system\n" + dialogue.system), self._end], 0, cursor)
            cursor = self._add(row, self._text("\n"), 0, cursor)
        if not dialogue.parallel:
            for turn in dialogue.turns:
                cursor = self._add(row, [self._start, *self._text("user\n")], 0, cursor)
                if turn.text_first:
                    cursor = self._add(row, self._text(turn.question), 0, cursor)
                cursor = self._show(row, turn, grids, cursor)
                if not turn.text_first:
                    cursor = self._add(row, self._text(turn.question), 0, cursor)
                cursor = self._answer(row, turn, 0, cursor)
            return row
        cursor = self._add(row, [self._start, *self._text("user\n")], 0, cursor)
        opening = self._show(row, dialogue.turns[0], grids, cursor)
        for branch, turn in enumerate(dialogue.turns, start=1):
            cursor = self._add(row, self._text(turn.question), branch, opening)
            self._answer(row, turn, branch, cursor)
        return row

    def first_id(self, text: str) -> int:
        """Return the first token id of `text`."""
        return self._text(text)[0]

    def _text(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._encode(text)
        return self._known[text]

    def _add(self, row: TrainingRow, ids: Sequence[int], branch: int, cursor: int, *, learn: bool = False) -> int:
        if learn:
            row.targets[-1] = ids[0]
            row.targets.extend([*ids[1:], IGNORED])
        else:
            row.targets.extend([IGNORED] * len(ids))
        row.ids.extend(ids)
        row.branches.extend([branch] * len(ids))
        row.positions.extend((position, position, position) for position in range(cursor, cursor + len(ids)))
        return cursor + len(ids)

    def _show(self, row: TrainingRow, turn: Turn, grids: Sequence[Grid], cursor: int) -> int:
        for picture in turn.pictures:
            height, width = grids[picture]
            cursor = self._add(row, [self._vision[0]], 0, cursor)
            row.ids.extend([self._image] * (height * width))
            row.targets.extend([IGNORED] * (height * width))
            row.branches.extend([0] * (height * width))
            row.positions.extend((cursor, cursor + y, cursor + x) for y in range(height) for x in range(width))
            row.pictures.append(picture)
            cursor = self._add(row, [self._vision[1]], 0, cursor + max(height, width))
        return cursor

    def _answer(self, row: TrainingRow, turn: Turn, branch: int, cursor: int) -> int:
        cursor = self._add(row, [self._end, *self._text("\n"), self._start, *self._text("assistant\n")], branch, cursor)
        cursor = self._add(row, [*self._text(turn.answer), self._end], branch, cursor, learn=True)
        return self._add(row, self._text("\n"), branch, cursor)


def collate(rows: Sequence[TrainingRow]) -> Batch:
    """Return the rows padded to the longest one."""
    import torch

    length = max(len(row.ids) for row in rows)
    pad = token_id("<|endoftext|>")

    def padded(lists: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([items + [value] * (length - len(items)) for items in lists])

    branches = padded([row.branches for row in rows], -1)
    positions = torch.tensor([row.positions + [(0, 0, 0)] * (length - len(row.ids)) for row in rows])
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    mask = (visible & earlier)[:, None]
    return Batch(
        ids=padded([row.ids for row in rows], pad),
        targets=padded([row.targets for row in rows], IGNORED),
        positions=positions.permute(2, 0, 1).contiguous(),
        mask=mask,
        pictures=[picture for row in rows for picture in row.pictures],
    )
