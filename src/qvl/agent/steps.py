"""The steps of a recommendation: their state, their events and the outcome."""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, TypedDict, Unpack

from qvl.agent.catalog.product import AnalysisRecord, Hit, HitRecord, QueryRecord
from qvl.errors import QvlError
from qvl.log import logger
from qvl.types import CacheState, JsonObject

if TYPE_CHECKING:
    from qvl.media.picture import PictureSource

Step: TypeAlias = Literal["analyze", "search", "answer"]
STEPS: Final = ("analyze", "search", "answer")
Kind: TypeAlias = Literal["start", "end", "error"]
log = logger("qvl.agent")


class State(TypedDict, total=False):
    """The state of a thread, in JSON values for any checkpointer; `analysed` is the picture of the last analysis."""

    picture: str | bytes
    analysed: str | bytes | None
    wish: str
    request_id: str
    analysis: AnalysisRecord
    evidence: dict[str, JsonObject]
    query: QueryRecord
    hits: list[HitRecord]
    notes: list[str]
    text: str
    written_by: str
    failed: str


class StepFacts(TypedDict, total=False):
    """The facts of a step or a call within it; `cache` is "thread" if the thread's state had the result."""

    wish: str
    attempt: int
    cache: CacheState | Literal["thread"]
    tokens: int
    model: str
    analysis: AnalysisRecord
    confidence: float | None
    query: QueryRecord
    hits: int
    ids: list[str]
    fits: list[str]
    skipped: str
    refused: str
    written_by: str
    failed: str
    error: str
    code: str


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """The start, end or failure of a step or of a call within it; `seconds` is its duration."""

    kind: Kind
    step: str
    name: str
    at: float
    data: StepFacts = dataclasses.field(default_factory=StepFacts)
    seconds: float = 0.0

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


class _Options(TypedDict, total=False):
    stop_before: Step | None
    on_event: Callable[[Event], object] | None


class RecommendOptions(_Options, total=False):
    """The keyword arguments of `recommend` besides picture and wish."""

    thread: str | None


class ResumeOptions(_Options, total=False):
    """The keyword arguments of `resume` besides the thread."""

    wish: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer with the analysis, query and hits that it is based on.

    `written_by` is "model" or "template". `pending` is the step before which a run was stopped; `failed` is the step
    that failed, with the reason in `notes`. `products` are in rank order. `evidence` has
    `Located.to_json()` of each field that is seen on the picture, where that was asked for.
    """

    text: str
    products: tuple[Hit, ...] = ()
    analysis: AnalysisRecord = dataclasses.field(default_factory=AnalysisRecord)
    query: QueryRecord = dataclasses.field(default_factory=QueryRecord)
    notes: tuple[str, ...] = ()
    written_by: str = ""
    thread: str = ""
    request_id: str = ""
    pending: str | None = None
    failed: str | None = None
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False, compare=False)
    evidence: JsonObject = dataclasses.field(default_factory=dict)

    @property
    def inferences(self) -> int:
        """The number of model requests in this run, without answers from the cache or from the thread's state."""
        kept = ("hit", "coalesced", "thread", None)
        return sum(event.kind == "end" and event.data.get("cache") not in kept for event in self.events)

    def to_json(self) -> JsonObject:
        """Return the recommendation as JSON values, without the events."""
        left = ("events",) if self.evidence else ("events", "evidence")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left}
        return {**fields, "products": [hit.to_json() for hit in self.products], "notes": list(self.notes)}

    def _repr_html_(self) -> str:
        from qvl.html.cards import recommendation_html

        return recommendation_html(self.text, self.rows(), self.notes, self.failed)

    def rows(self) -> list[dict[str, str]]:
        """Return the products as table rows: text by column name."""
        return [
            {
                "name": hit.product.name,
                "url": hit.product.url or "",
                "price": hit.product.price_text,
                "id": hit.product.id,
                "why": ", ".join((*hit.why, *(() if hit.fit is None else (f"fits the wish {hit.fit:.0%}",)))),
            }
            for hit in self.products
        ]


class StepError(QvlError):
    """A step failed; `recommendation` has the results of earlier steps, and `resume()` continues from there."""

    default_code = "step_failed"

    def __init__(self, recommendation: Recommendation, cause: QvlError) -> None:
        super().__init__(f"{recommendation.failed} failed: {cause.message}", hint=cause.hint, code=cause.code)
        self.recommendation = recommendation


class Note:
    """Writes the events of a step, or of a call within it: the start when constructed, then its end or failure."""

    def __init__(self, write: Callable[[Event], None], step: str, name: str, **facts: Unpack[StepFacts]) -> None:
        self._write, self._step, self._name = write, step, name
        self._began = time.perf_counter()
        self._facts = facts
        self._event("start", facts)

    def _event(self, kind: Kind, facts: StepFacts, seconds: float = 0.0) -> None:
        self._write(Event(kind, self._step, self._name, time.time(), facts, seconds))

    @property
    def seconds(self) -> float:
        """The seconds since the step or call started."""
        return time.perf_counter() - self._began

    def call(self, name: str, **facts: Unpack[StepFacts]) -> Note:
        """Write the start of a call within the step and return the call's Note."""
        return Note(self._write, self._step, name, **facts)

    def end(self, **facts: Unpack[StepFacts]) -> None:
        self._event("end", {**self._facts, **facts}, self.seconds)

    def fail(self, error: QvlError) -> None:
        self._event("error", {**self._facts, "error": str(error), "code": error.code}, self.seconds)


class GraphNode(Protocol):
    """The signature of a LangGraph node."""

    def __call__(self, state: State) -> State: ...


def watched(name: str, node: Callable[[State, Note], State]) -> GraphNode:
    """Return `node` with its events written to the graph's stream and its outcome to the log."""

    def run(state: State) -> State:
        from langgraph.config import get_stream_writer
        from structlog.contextvars import bound_contextvars

        facts: StepFacts = {"wish": state.get("wish", "")} if name == "search" else {}
        with bound_contextvars(request_id=state.get("request_id", "")):
            note = Note(get_stream_writer(), name, name, **facts)
            try:
                update = node(state, note)
            except QvlError as exc:
                note.fail(exc)
                log.info("step failed", step=name, error=str(exc))
                raise
            log.info("step done", step=name, seconds=round(note.seconds, 4))
            return update

    return run


def plain_picture(picture: PictureSource) -> str | bytes:
    """Return a picture in a form that a checkpoint can store: an absolute path, a URL, or bytes."""
    if isinstance(picture, str | os.PathLike):
        text = os.fspath(picture)
        return text if "://" in text or text.startswith("data:") else os.path.abspath(text)
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if hasattr(picture, "read"):
        content: bytes = picture.read()
        return content
    from qvl.media import gate

    buffer = io.BytesIO()
    gate.load(picture).rgb().save(buffer, "PNG")
    return buffer.getvalue()
