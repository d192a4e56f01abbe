"""One after the other what a model writes at once, for an API whose blocks follow each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from qvl.backends.local.text.tool_call import ObjectScanner
from qvl.types import Chunk, ToolCallDelta

if TYPE_CHECKING:
    from typing import Literal

Piece: TypeAlias = "ToolCallDelta | tuple[Literal['thinking', 'text'], str]"


class InTurn:
    """Orders the pieces of an answer so that a call that has begun ends before anything else is written.

    A call has ended when its arguments are a whole JSON object; pieces of others wait until then, at most until
    `rest`.
    """

    def __init__(self) -> None:
        self._waiting: list[Piece] = []
        self._call: int | None = None
        self._ended: set[int] = set()
        self._arguments = ""
        self._scanner = ObjectScanner()

    def take(self, chunk: Chunk) -> Iterator[Piece]:
        """Yield what can be written now that `chunk` has come."""
        if chunk.reasoning:
            self._waiting.append(("thinking", chunk.reasoning))
        if chunk.text:
            self._waiting.append(("text", chunk.text))
        self._waiting += chunk.tool_calls
        yield from self._ready()

    def rest(self) -> Iterator[Piece]:
        """Yield all that waits, calls that never ended included."""
        while self._waiting:
            self._call = None
            yield from self._ready()

    def _ready(self) -> Iterator[Piece]:
        while self._waiting:
            turn = (at for at, piece in enumerate(self._waiting) if self._call in (None, _call_of(piece)))
            if (at := next(turn, None)) is None:
                return
            piece = self._waiting.pop(at)
            if isinstance(piece, ToolCallDelta):
                if piece.index in self._ended:
                    # Behind its last brace a call has nothing that could be read.
                    continue
                self._read(piece)
            yield piece

    def _read(self, delta: ToolCallDelta) -> None:
        if self._call is None:
            self._call, self._arguments, self._scanner = delta.index, "", ObjectScanner()
        self._arguments += delta.arguments
        self._scanner.feed(self._arguments)
        if self._scanner.end is not None:
            self._ended.add(delta.index)
            self._call = None


def _call_of(piece: Piece) -> int | None:
    return piece.index if isinstance(piece, ToolCallDelta) else -1
