"""Tells the tool calls of one streamed choice apart, however their endpoint numbers and names them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qvl.types import ToolCallDelta


@dataclass(slots=True)
class PlacedCall:
    """What has come of one call."""

    index: int | None
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    @property
    def whole(self) -> bool:
        try:
            return isinstance(json.loads(self.arguments), dict)
        except ValueError:
            return False


class CallPlacer:
    """Gives each tool call of one choice an index of its own.

    A piece with a name begins another call if it brings a new id or a new name, or arguments after those of the call
    at its index are complete: servers send parallel calls under one index, under one id or without either, and repeat
    id and name in later pieces of one call.
    """

    __slots__ = ("_calls", "_places")

    def __init__(self) -> None:
        self._calls: list[PlacedCall] = []
        self._places: dict[tuple[str, int | None], int] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def whole(self) -> bool:
        """False while the arguments of a call have begun and not ended."""
        return all(call.whole or not call.arguments.strip() for call in self._calls)

    def read(self, calls: Iterable[Mapping[str, Any]]) -> tuple[ToolCallDelta, ...]:
        """The pieces of one event, each with its call's index; id and name come once."""
        calls = list(calls)
        return tuple(self._read(call, place if len(calls) > 1 else None) for place, call in enumerate(calls))

    def _read(self, piece: Mapping[str, Any], place: int | None) -> ToolCallDelta:
        function = piece.get("function") or {}
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
        index = None if piece.get("index") is None else int(piece["index"])
        come = PlacedCall(index, piece.get("id") or None, function.get("name") or None, arguments)
        at = self._place(("place", place) if index is None else ("index", index), come)
        call = self._calls[at]
        # Once each: clients put the pieces of a name together.
        new = ToolCallDelta(
            index=at, id=None if call.id else come.id, name=None if call.name else come.name, arguments=arguments
        )
        call.id, call.name, call.arguments = call.id or come.id, call.name or come.name, call.arguments + arguments
        return new

    def _place(self, key: tuple[str, int | None], come: PlacedCall) -> int:
        at = self._of_same_id(come)
        if at is None:
            at = self._places.get(key)
        if at is None and key == ("place", None) and self._calls:
            at = len(self._calls) - 1
        if at is None or (come.name and self._begins_another(self._calls[at], come)):
            at = len(self._calls)
            self._calls.append(PlacedCall(come.index))
        self._places[key] = at
        return at

    def _of_same_id(self, come: PlacedCall) -> int | None:
        """The latest call of this id, unless another index says that it is another call."""
        if come.id is None:
            return None
        for at in range(len(self._calls) - 1, -1, -1):
            call = self._calls[at]
            if call.id == come.id and (come.index is None or call.index in (None, come.index)):
                return at
        return None

    @staticmethod
    def _begins_another(call: PlacedCall, come: PlacedCall) -> bool:
        if call.id is not None and come.id is not None and call.id != come.id:
            return True
        if call.name is not None and call.name != come.name:
            return True
        return bool(come.arguments.strip()) and call.whole
