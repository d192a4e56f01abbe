"""One answer from the answers to single pages of a document.

What a page does not tell (null, "", an empty list or object) leaves the field to the others. Lists are joined in the
order of the pages, scalars that are there already left out. Objects are merged field by field. Of different values
the most confident one holds, without confidences the first, and a note says what was told elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from qvl.types import JsonMapping, JsonObject

NOTHING: Final[tuple[object, ...]] = (None, "", [], {})
_LONGEST: Final = 60


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """The answer of one page, and how sure it is of each value, by path (like `items.0.name`)."""

    page: int
    data: JsonMapping
    sure: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class MergedAnswer:
    """The merged answer: the page of each value, and its confidence, by path; notes of what was told differently."""

    data: JsonObject = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    sure: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Told:
    """A value that one page tells at `path` of its answer."""

    of: PageAnswer
    value: object
    path: str

    @property
    def sure(self) -> float | None:
        return self.of.sure.get(self.path)

    def below(self, name: str | int, value: object) -> _Told:
        return _Told(self.of, value, f"{self.path}.{name}" if self.path else str(name))


def merge_pages(answers: Sequence[PageAnswer]) -> MergedAnswer:
    """Return the one answer that the answers to single pages amount to."""
    merged = MergedAnswer()
    names = dict.fromkeys(name for answer in answers for name in answer.data)
    for name in names:
        told = [_Told(answer, answer.data[name], name) for answer in answers if name in answer.data]
        merged.data[name] = _merged(told, name, merged)
    return merged


def _merged(told: Sequence[_Told], path: str, into: MergedAnswer) -> object:
    telling = [one for one in told if one.value not in NOTHING]
    if not telling:
        return told[0].value
    if all(isinstance(one.value, list) for one in telling):
        return _joined(telling, path, into)
    if all(isinstance(one.value, dict) for one in telling):
        names = dict.fromkeys(name for one in telling for name in _fields(one))
        return {
            name: _merged([one.below(name, _fields(one)[name]) for one in telling if name in _fields(one)], below, into)
            for name in names
            for below in (f"{path}.{name}",)
        }
    # The first of the surest: max keeps the earlier of equals.
    best = max(telling, key=lambda one: -1.0 if one.sure is None else one.sure)
    _keep(best, path, into)
    others = [one for one in telling if one.value != best.value]
    if others:
        elsewhere = ", ".join(f"page {one.of.page}: {_short(one.value)}" for one in others[:3])
        into.notes.append(f"{path}: {_short(best.value)} of page {best.of.page} is taken; {elsewhere}")
    return best.value


def _joined(told: Sequence[_Told], path: str, into: MergedAnswer) -> list[object]:
    items: list[object] = []
    for one in told:
        assert isinstance(one.value, list)
        before = len(items)
        for number, item in enumerate(one.value):
            if not isinstance(item, dict | list) and item in items[:before]:
                continue
            _keep(one.below(number, item), f"{path}.{len(items)}", into)
            items.append(item)
    return items


def _keep(one: _Told, path: str, into: MergedAnswer) -> None:
    """Note page and confidences of a value that is taken as it is."""
    into.pages[path] = one.of.page
    for own, sure in one.of.sure.items():
        if own == one.path or own.startswith(f"{one.path}."):
            into.sure[path + own[len(one.path) :]] = sure


def _fields(one: _Told) -> Mapping[str, object]:
    assert isinstance(one.value, dict)
    return one.value


def _short(value: object) -> str:
    text = str(value)
    return repr(value) if len(text) <= _LONGEST else f"{text[:_LONGEST]!r}…"
