"""The steps of a recommendation: what they remember, what they tell as they run, and what comes out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from qvl.agent.catalog.product import Hit
from qvl.errors import QvlError
from qvl.log import logger

log = logger("qvl.agent")


class State(TypedDict, total=False):
    """What a thread remembers, in plain values, so that any checkpointer can keep it."""

    picture: Any
    analysed: Any
    wish: str
    request_id: str
    analysis: dict[str, Any]
    query: dict[str, Any]
    hits: list[dict[str, Any]]
    notes: list[str]
    text: str
    written_by: str
    failed: str


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: a step or a call within it began, ended or failed. `seconds` is what it took."""

    kind: Literal["start", "end", "error"]
    step: str
    name: str
    at: float
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "data": dict(self.data)}


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer and all that it stands on.

    `written_by` is "model" or "template". `pending` is the step that comes next where a run was stopped before it;
    `failed` the step that failed, with the reason in `notes`. `products` are in the order of their rank.
    """

    text: str
    products: tuple[Hit, ...] = ()
    analysis: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    query: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    written_by: str = ""
    thread: str = ""
    request_id: str = ""
    pending: str | None = None
    failed: str | None = None
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def inferences(self) -> int:
        """How often a model was asked in this run: neither answers from a cache nor what the thread remembers."""
        kept = ("hit", "coalesced", "thread", None)
        return sum(event.kind == "end" and event.data.get("cache") not in kept for event in self.events)

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "events"}
        return {
            **found,
            "products": [hit.to_json() for hit in self.products],
            "analysis": dict(self.analysis),
            "query": dict(self.query),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        from qvl.html.cards import recommendation_html

        return recommendation_html(self.text, self.rows(), self.notes, self.failed)

    def rows(self) -> list[dict[str, str]]:
        """The products as text, as a table shows them."""
        return [
            {
                "name": hit.product.name,
                "url": hit.product.url or "",
                "price": hit.product.price_text,
                "id": hit.product.id,
                "why": ", ".join(hit.why),
            }
            for hit in self.products
        ]


class StepError(QvlError):
    """A step failed, and what came before it is kept: `recommendation` has it, and `resume()` goes on from there."""

    default_code = "step_failed"

    def __init__(self, recommendation: Recommendation, cause: QvlError) -> None:
        super().__init__(f"{recommendation.failed} failed: {cause.message}", hint=cause.hint, code=cause.code)
        self.recommendation = recommendation


class Note:
    """Tells of one step, or of a call within it, as it begins, ends and fails."""

    def __init__(self, write: Callable[[dict[str, Any]], None], step: str, name: str, **data: Any) -> None:
        self._write, self._step, self._name = write, step, name
        self._began = time.perf_counter()
        self._data: dict[str, Any] = data
        self._tell("start", data)

    def _tell(self, kind: str, data: Mapping[str, Any], seconds: float = 0.0) -> None:
        at = time.time()
        self._write(
            {"kind": kind, "step": self._step, "name": self._name, "at": at, "data": dict(data), "seconds": seconds}
        )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def call(self, name: str, **data: Any) -> Note:
        return Note(self._write, self._step, name, **data)

    def end(self, **data: Any) -> None:
        self._tell("end", {**self._data, **data}, self.seconds)

    def fail(self, error: QvlError) -> None:
        self._tell("error", {**self._data, "error": str(error), "code": error.code}, self.seconds)


def watched(name: str, node: Callable[[State, Note], State]) -> Any:
    def run(state: State) -> State:
        from langgraph.config import get_stream_writer
        from structlog.contextvars import bound_contextvars

        with bound_contextvars(request_id=state.get("request_id", "")):
            note = Note(
                get_stream_writer(), name, name, **({"wish": state.get("wish", "")} if name == "search" else {})
            )
            try:
                found = node(state, note)
            except QvlError as exc:
                note.fail(exc)
                log.info("step failed", step=name, error=str(exc))
                raise
            log.info("step done", step=name, seconds=round(note.seconds, 4))
            return found

    return run
