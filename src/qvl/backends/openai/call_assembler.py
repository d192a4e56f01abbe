"""Assigns streamed pieces of tool calls to their calls, whatever indices and ids the endpoint sends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from qvl.backends.openai.wire import WireToolCall
from qvl.types import ToolCallDelta


@dataclass(slots=True)
class PartialCall:
    """The pieces of one tool call so far."""

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


class CallAssembler:
    """Assigns a unique index to each tool call of one choice.

    A piece with a name begins another call if its id or name is new, or if the arguments of the call at its index are
    complete: some servers send parallel calls with one index, one id or neither, and repeat id and name in later
    pieces of a call.
    """

    def __init__(self) -> None:
        self._calls: list[PartialCall] = []
        self._indices: dict[tuple[str, int | None], int] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def whole(self) -> bool:
        """True unless the arguments of a call are incomplete."""
        return all(call.whole or not call.arguments.strip() for call in self._calls)

    def read(self, calls: Iterable[WireToolCall]) -> tuple[ToolCallDelta, ...]:
        """Return the deltas of one event, each with its call's index; id and name are sent once."""
        calls = list(calls)
        return tuple(self._read(call, position if len(calls) > 1 else None) for position, call in enumerate(calls))

    def _read(self, wire_call: WireToolCall, position: int | None) -> ToolCallDelta:
        function = wire_call.get("function") or {}
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
        number = wire_call.get("index")
        index = None if number is None else int(number)
        piece = PartialCall(index, wire_call.get("id") or None, function.get("name") or None, arguments)
        at = self._index_of(("position", position) if index is None else ("index", index), piece)
        call = self._calls[at]
        # Once each: clients put the pieces of a name together.
        new = ToolCallDelta(
            index=at, id=None if call.id else piece.id, name=None if call.name else piece.name, arguments=arguments
        )
        call.id, call.name, call.arguments = call.id or piece.id, call.name or piece.name, call.arguments + arguments
        return new

    def _index_of(self, key: tuple[str, int | None], piece: PartialCall) -> int:
        at = self._of_same_id(piece)
        if at is None:
            at = self._indices.get(key)
        if at is None and key == ("position", None) and self._calls:
            at = len(self._calls) - 1
        if at is None or (piece.name and self._begins_another(self._calls[at], piece)):
            at = len(self._calls)
            self._calls.append(PartialCall(piece.index))
        self._indices[key] = at
        return at

    def _of_same_id(self, piece: PartialCall) -> int | None:
        """Return the index of the latest call with the piece's id, unless its index shows that it is another call."""
        if piece.id is None:
            return None
        for at in range(len(self._calls) - 1, -1, -1):
            call = self._calls[at]
            if call.id == piece.id and (piece.index is None or call.index in (None, piece.index)):
                return at
        return None

    @staticmethod
    def _begins_another(call: PartialCall, piece: PartialCall) -> bool:
        other_id = call.id is not None and piece.id not in (None, call.id)
        other_name = call.name not in (None, piece.name)
        return other_id or other_name or (bool(piece.arguments.strip()) and call.whole)
