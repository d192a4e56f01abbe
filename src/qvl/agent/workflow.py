"""`Recommender`: look, then find, then recommend, in this order and no other.

A LangGraph graph of three nodes: `analyze` (one analysis, from the cache where it is known), `search` (one retrieval),
`answer` (checked against the hits, or from a template). A thread remembers its picture, so follow-up questions look no
second time, and with a file of checkpoints a run that was cut off goes on after its last finished node.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import sqlite3
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

from qvl.agent import grounding
from qvl.agent.catalog.parse_wish import read_wish, relaxed
from qvl.agent.catalog.product import Hit, Product, Query
from qvl.agent.steps import Event, Note, Recommendation, State, StepError, watched
from qvl.errors import ConfigError, MissingDependencyError, QvlError
from qvl.suggest import install_line, nearest

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog
    from qvl.media.picture import PictureSource
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.sync_pipeline import Pipeline

Step: TypeAlias = Literal["analyze", "search", "answer"]
STEPS: Final = ("analyze", "search", "answer")
MAX_ANSWER_TOKENS: Final = 400
R = TypeVar("R")


class Recommender:
    """Recommends products of a catalogue for a picture and a wish.

    Args:
        pipeline: a Pipeline, or an AsyncPipeline for the methods that begin with `a`.
        limit: how many products to show.
        writes: whether the model is asked to write the answer; None asks every model but the bundled one, which can
            only look. Without, the answer is made from a template, and says so in `written_by`.
        checkpoints: a SQLite file for threads, so that they outlive the process; None keeps them in memory.
        language: of the analysis; None is the pipeline's.

    Raises:
        MissingDependencyError: langgraph is not installed.
    """

    def __init__(
        self,
        pipeline: Pipeline | AsyncPipeline,
        catalog: Catalog,
        *,
        limit: int = 5,
        writes: bool | None = None,
        checkpoints: str | Path | None = None,
        language: str | None = None,
    ) -> None:
        from qvl.pipeline.sync_pipeline import Pipeline

        if not 1 <= limit <= 50:
            raise ConfigError(f"limit={limit} is out of range", hint="from 1 to 50", param="limit")
        self.blocking = pipeline if isinstance(pipeline, Pipeline) else None
        self.pipeline: AsyncPipeline = pipeline.pipeline if isinstance(pipeline, Pipeline) else pipeline
        self.catalog = catalog
        self.limit = limit
        self.language = language
        backend = self.pipeline.backend
        self.writes = (backend.name, backend.model) != ("local", "bundled") if writes is None else writes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._db: sqlite3.Connection | None = None
        self._graph = self._build(checkpoints)

    def _build(self, checkpoints: str | Path | None) -> Any:
        try:
            from langgraph.checkpoint.memory import InMemorySaver
            from langgraph.checkpoint.sqlite import SqliteSaver
            from langgraph.graph import END, START, StateGraph
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(
                f"the workflow needs the package {exc.name!r}", hint=install_line("agent")
            ) from exc
        saver: Any = InMemorySaver()
        if checkpoints is not None:
            try:
                self._db = sqlite3.connect(str(checkpoints), check_same_thread=False, timeout=30.0)
                saver = SqliteSaver(self._db)
                saver.setup()
            except sqlite3.Error as exc:
                raise ConfigError(f"checkpoints {checkpoints} cannot be used: {exc}", hint="name another file") from exc
        graph = StateGraph(State)
        for name, node in (("analyze", self._analyze), ("search", self._search), ("answer", self._answer)):
            graph.add_node(name, watched(name, node))
        for before, after in ((START, "analyze"), ("analyze", "search"), ("search", "answer"), ("answer", END)):
            graph.add_edge(before, after)
        return graph.compile(checkpointer=saver)

    def recommend(
        self,
        picture: PictureSource | None = None,
        wish: str = "",
        *,
        thread: str | None = None,
        stop_before: Step | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Recommendation:
        """Looks at the picture, searches, and answers.

        Args:
            picture: None goes on with the picture of the thread: "cheaper ones?".
            thread: what remembers; None is a new one, named in the answer.
            stop_before: a step to stop before; `resume` goes on.
            on_event: is told of every step as it begins and ends.

        Raises:
            StepError: a step failed; the steps before it are kept.
            ConfigError: no picture, and the thread has none.
        """
        if stop_before not in (None, *STEPS):
            raise ConfigError(f"unknown step {stop_before!r}", hint=nearest(str(stop_before), STEPS))
        thread = thread or uuid.uuid4().hex
        state = self._values(thread)
        if picture is None and state.get("picture") is None:
            raise ConfigError("no picture", hint="give one, or name a thread that has one", param="picture")
        given: State = {"wish": wish, "request_id": f"qvl-{uuid.uuid4().hex}", "failed": "", "notes": [], "text": ""}
        if picture is not None:
            given["picture"] = _kept(picture)
            given["analysed"] = None
            given["analysis"] = {}
            given["query"] = {}
            given["hits"] = []
        return self._run(given, thread, stop_before, on_event)

    def resume(
        self,
        thread: str,
        *,
        wish: str | None = None,
        stop_before: Step | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Recommendation:
        """Goes on where a run of the thread was stopped, failed or was killed; nothing that is done is done again.

        Args:
            wish: replaces the wish, where the search is still to come.

        Raises:
            ConfigError: there is no such thread.
        """
        config = self._config(thread)
        if not self._values(thread):
            raise ConfigError(f"unknown thread {thread!r}", hint="give the file of checkpoints it was begun with")
        if wish is not None:
            self._graph.update_state(config, {"wish": wish}, as_node=_done_before(self._next(thread)))
        return self._run(None, thread, stop_before, on_event)

    async def arecommend(self, picture: PictureSource | None = None, wish: str = "", **options: Any) -> Recommendation:
        """As `recommend`, in a running event loop."""
        self._loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self.recommend, picture, wish, **options)

    async def aresume(self, thread: str, **options: Any) -> Recommendation:
        """As `resume`, in a running event loop."""
        self._loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self.resume, thread, **options)

    async def astream(
        self, picture: PictureSource | None = None, wish: str = "", **options: Any
    ) -> AsyncGenerator[Event | Recommendation, None]:
        """The events as they happen; the last item is the Recommendation."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        options["on_event"] = lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)
        run = asyncio.ensure_future(self.arecommend(picture, wish, **options))
        while not run.done() or not queue.empty():
            waiting = asyncio.ensure_future(queue.get())
            await asyncio.wait({run, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                yield waiting.result()
            else:
                waiting.cancel()
                await asyncio.sleep(0)
        yield await run

    def close(self) -> None:
        """Closes the file of checkpoints; pipeline and catalogue stay open."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _run(
        self, given: State | None, thread: str, stop_before: Step | None, on_event: Callable[[Event], None] | None
    ) -> Recommendation:
        events: list[Event] = []
        stops = [stop_before] if stop_before else None
        failure: QvlError | None = None
        try:
            # Written before the next node starts, so that a killed process loses at most the node it was in.
            for item in self._graph.stream(
                given, self._config(thread), stream_mode="custom", interrupt_before=stops, durability="sync"
            ):
                events.append(Event(**item))
                if on_event is not None:
                    on_event(events[-1])
        except QvlError as exc:
            failure = exc
        found = self._recommendation(thread, events)
        if failure is None:
            return found
        step = next((event.step for event in reversed(events) if event.kind == "error"), found.pending or "")
        raise StepError(dataclasses.replace(found, failed=step), failure) from failure

    def _recommendation(self, thread: str, events: Sequence[Event]) -> Recommendation:
        state = self._values(thread)
        return Recommendation(
            text=state.get("text", ""),
            products=tuple(_hit(item) for item in state.get("hits", [])),
            analysis=state.get("analysis", {}),
            query=state.get("query", {}),
            notes=tuple(state.get("notes", [])),
            written_by=state.get("written_by", "") if state.get("text") else "",
            thread=thread,
            request_id=state.get("request_id", ""),
            pending=self._next(thread),
            failed=state.get("failed") or None,
            events=tuple(events),
        )

    def _config(self, thread: str) -> Any:
        return {"configurable": {"thread_id": thread}}

    def _values(self, thread: str) -> State:
        values: State = self._graph.get_state(self._config(thread)).values
        return values

    def _next(self, thread: str) -> str | None:
        return next(iter(self._graph.get_state(self._config(thread)).next), None)

    def _analyze(self, state: State, note: Note) -> State:
        picture: Any = state.get("picture")
        if state.get("analysed") == picture and state.get("analysis"):
            note.end(cache="thread", analysis=state["analysis"])
            return {}
        found = self._wait(
            lambda: self.pipeline.analyze_result(picture, language=self.language, request_id=state["request_id"])
        )
        value = found.value
        analysis = {"brand": value.brand, "category": value.category, "attributes": dict(value.attributes)}
        note.end(
            cache=found.result.cache,
            analysis=analysis,
            confidence=found.confidence,
            tokens=found.result.usage.total_tokens if found.result.cache != "hit" else 0,
            model=f"{found.result.backend}:{found.result.model}",
        )
        return {"analysis": analysis, "analysed": picture}

    def _search(self, state: State, note: Note) -> State:
        analysis, notes = state["analysis"], list(state.get("notes", []))
        if grounding.shows_nothing(analysis):
            note.end(hits=0, skipped="no product on the picture")
            return {"hits": [], "query": {}, "notes": notes}
        before = Query(**state["query"]) if state.get("query") else None
        shown = state.get("hits") or []
        first = Product.from_json(shown[0]["product"]) if shown else None
        wish = read_wish(state.get("wish", ""), self.catalog, analysis, before, first)
        query = dataclasses.replace(wish.query, picture=state.get("picture"))
        more = min(100, self.limit + 20 * bool(wish.without))
        found = self.catalog.search(query, limit=more)
        notes += found.notes
        if not found.hits and query.only:
            wanted = ", ".join(f"{name} {value}" for name, value in query.only.items())
            priced = query.max_price is not None or query.min_price is not None
            found = self.catalog.search(relaxed(query), limit=more)
            near = "; these come near" if found.hits else ""
            notes.append(f"nothing is {wanted}{' at that price' if priced else ''}{near}")
        hits = [hit for hit in found.hits if not _has_any(hit, wish.without)][: self.limit]
        asked = query.to_json()
        note.end(query=asked, hits=len(hits), ids=[hit.product.id for hit in hits])
        return {"query": asked, "hits": [hit.to_json() for hit in hits], "notes": notes}

    def _answer(self, state: State, note: Note) -> State:
        analysis, hits = state["analysis"], [_hit(item) for item in state.get("hits", [])]
        notes, failed = list(state.get("notes", [])), ""
        text = None
        if self.writes and hits:
            try:
                text = self._written(state, analysis, hits, note, notes)
            except QvlError as exc:
                failed = "answer"
                notes.append(f"answer failed: {exc}; the text is from a template")
        written_by = "template" if text is None else "model"
        if text is None:
            if not self.writes:
                notes.append("the text is from a template: this model does not write answers")
            text = grounding.template(analysis, hits)
        note.end(written_by=written_by, **({"failed": failed} if failed else {}))
        return {"text": text, "written_by": written_by, "notes": notes, "failed": failed}

    def _written(
        self, state: State, analysis: Mapping[str, Any], hits: Sequence[Hit], note: Note, notes: list[str]
    ) -> str | None:
        """What the model writes about the hits, asked twice at most; None when it names what is not there."""
        wish = state.get("wish", "")
        known = [grounding.describe(analysis), wish]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": grounding.SYSTEM},
            {"role": "user", "content": grounding.question(analysis, wish, hits)},
        ]
        wrong: str | None = None
        for attempt in range(2):
            call = note.call("model", attempt=attempt + 1)
            ask = partial(
                self.pipeline.chat,
                list(messages),
                max_tokens=MAX_ANSWER_TOKENS,
                request_id=state["request_id"],
            )
            try:
                result = self._wait(ask)
            except QvlError as exc:
                call.fail(exc)
                raise
            wrong = grounding.problem(result.text, hits, known, self._is_brand)
            spent = result.usage.total_tokens if result.cache != "hit" else 0
            call.end(cache=result.cache, tokens=spent, **({"refused": wrong} if wrong else {}))
            if wrong is None:
                return grounding.filled(result.text.strip(), hits)
            messages += [
                {"role": "assistant", "content": result.text},
                {"role": "user", "content": grounding.AGAIN.format(problem=wrong)},
            ]
        notes.append(f"the text is from a template: the model's was refused twice ({wrong})")
        return None

    def _is_brand(self, word: str) -> bool:
        return any(name == "brand" for name, _ in self.catalog.values(word))

    def _wait(self, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Runs pipeline work in the loop that the pipeline lives in."""
        if self.blocking is not None:
            return self.blocking._call(work)
        if self._loop is None:
            raise ConfigError("an AsyncPipeline needs a running loop", hint="await arecommend(), or give a Pipeline")
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result()


def _kept(picture: Any) -> Any:
    """A picture as a checkpoint can keep it: an absolute path, a URL, or bytes."""
    if isinstance(picture, str | os.PathLike):
        text = os.fspath(picture)
        return text if isinstance(text, bytes) or "://" in text or text.startswith("data:") else os.path.abspath(text)
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if hasattr(picture, "read"):
        return picture.read()
    from qvl.media import gate

    buffer = io.BytesIO()
    gate.load(picture).rgb().save(buffer, "PNG")
    return buffer.getvalue()


def _hit(item: Mapping[str, Any]) -> Hit:
    return Hit(Product.from_json(item["product"]), item["score"], tuple(item["why"]))


def _has_any(hit: Hit, pairs: Sequence[tuple[str, str]]) -> bool:
    from qvl.agent.catalog.index import facets
    from qvl.agent.catalog.tokenize import key

    exact = facets(hit.product)
    return any((key(name), key(value)) in exact for name, value in pairs)


def _done_before(step: str | None) -> str | None:
    """The node after which `step` comes."""
    order = ("__start__", *STEPS)
    return order[order.index(step) - 1] if step in STEPS else None
