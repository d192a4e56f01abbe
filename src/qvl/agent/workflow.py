"""`Recommender`: a workflow with a fixed order: analyze, search, answer.

A LangGraph graph of three nodes: `analyze` (one analysis, or a cache hit), `search` (one retrieval), `answer` (checked
against the hits, or from a template). A thread keeps its picture, so follow-up questions need no new analysis, and with
a checkpoint file an interrupted run continues after its last finished node.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, cast

from qvl.agent import grounding, judge
from qvl.agent.catalog.index import facets
from qvl.agent.catalog.parse_wish import read_wish, relaxed
from qvl.agent.catalog.product import AnalysisRecord, Hit, Product, Query
from qvl.agent.catalog.tokenize import key
from qvl.agent.steps import (
    STEPS,
    Event,
    Note,
    Recommendation,
    RecommendOptions,
    ResumeOptions,
    State,
    Step,
    StepError,
    StepFacts,
    plain_picture,
    watched,
)
from qvl.errors import ConfigError, MissingDependencyError, QvlError
from qvl.suggest import install_line, nearest

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

    from qvl.agent.catalog.catalog import Catalog
    from qvl.media.picture import PictureSource
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.sync_pipeline import Pipeline
    from qvl.types import Result

MAX_ANSWER_TOKENS: Final = 400
R = TypeVar("R")
# The requests of a run in a thread, which cannot be cancelled itself.
_STARTED: ContextVar[list[Future[Any]] | None] = ContextVar("_STARTED", default=None)


class Recommender:
    """Recommends products of a catalogue for a picture and a wish.

    Args:
        pipeline: a Pipeline, or an AsyncPipeline for the methods that begin with `a`.
        limit: the most products to show.
        writes: True if the model writes the answer, False if a template does. None is True for every model but the
            bundled one, which can only analyze.
        checkpoints: a SQLite file that keeps the threads (conversations) after the process ends; None: memory only.
        language: the language of the analysis; None takes the pipeline's.
        judge: True to ask the model of each hit whether it fits the wish, and to order them by that.
        evidence: True to ask with the analysis where brand and product are seen (`Recommendation.evidence`).

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
        judge: bool = False,
        evidence: bool = False,
    ) -> None:
        from qvl.pipeline.sync_pipeline import Pipeline

        if not 1 <= limit <= 50:
            raise ConfigError(f"limit={limit} is out of range", hint="from 1 to 50", param="limit")
        self.blocking = pipeline if isinstance(pipeline, Pipeline) else None
        self.pipeline: AsyncPipeline = pipeline.pipeline if isinstance(pipeline, Pipeline) else pipeline
        self.catalog = catalog
        self.limit = limit
        self.language = language
        self.judge = judge
        self.evidence = evidence
        backend = self.pipeline.backend
        self._bundled = (backend.name, backend.model) == ("local", "bundled")
        self.writes = not self._bundled if writes is None else writes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._db: sqlite3.Connection | None = None
        self._graph = self._build(checkpoints)

    def _build(self, checkpoints: str | Path | None) -> CompiledStateGraph[State, None, State, State]:
        try:
            from langgraph.checkpoint.memory import InMemorySaver
            from langgraph.checkpoint.sqlite import SqliteSaver
            from langgraph.graph import END, START, StateGraph
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(
                f"the workflow needs the package {exc.name!r}", hint=install_line("agent")
            ) from exc
        saver: BaseCheckpointSaver[str] = InMemorySaver()
        if checkpoints is not None:
            try:
                self._db = sqlite3.connect(str(checkpoints), check_same_thread=False, timeout=30.0)
                saver = sqlite_saver = SqliteSaver(self._db)
                sqlite_saver.setup()
            except sqlite3.Error as exc:
                self.close()
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
        on_event: Callable[[Event], object] | None = None,
    ) -> Recommendation:
        """Analyze the picture, search the catalogue, and return the recommendation.

        Args:
            picture: the product's picture; None uses the thread's, for a follow-up wish such as "cheaper ones?".
            thread: the id of a conversation; None starts a new one, whose id is the recommendation's `thread`.
            stop_before: the step before which to stop; `resume` continues from there.
            on_event: called with every event.

        Raises:
            StepError: a step failed; results of earlier steps are kept.
            ConfigError: no picture is given, and the thread has none.
        """
        if stop_before not in (None, *STEPS):
            raise ConfigError(f"unknown step {stop_before!r}", hint=nearest(str(stop_before), STEPS))
        thread = thread or uuid.uuid4().hex
        state = self._values(thread)
        if picture is None and state.get("picture") is None:
            raise ConfigError("no picture to analyze", hint="pass one, or a thread that has one", param="picture")
        update: State = {"wish": wish, "request_id": f"qvl-{uuid.uuid4().hex}", "failed": "", "notes": [], "text": ""}
        if picture is not None:
            update |= {"picture": plain_picture(picture), "analysed": None, "analysis": {}, "query": {}, "hits": []}
            update["evidence"] = {}
        return self._run(update, thread, stop_before, on_event)

    def resume(
        self,
        thread: str,
        *,
        wish: str | None = None,
        stop_before: Step | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> Recommendation:
        """Continue the thread's unfinished run and return the recommendation; finished steps are not repeated.

        Args:
            wish: a new wish, used if the search has not run yet; None keeps the wish.

        Raises:
            ConfigError: the thread does not exist.
        """
        config = self._config(thread)
        if not self._values(thread):
            raise ConfigError(f"unknown thread {thread!r}", hint="open the checkpoint file with which it was started")
        if wish is not None:
            step, order = self._next(thread), ("__start__", *STEPS)
            done_before = order[order.index(step) - 1] if step in STEPS else None
            self._graph.update_state(config, {"wish": wish}, as_node=done_before)
        return self._run(None, thread, stop_before, on_event)

    async def arecommend(
        self, picture: PictureSource | None = None, wish: str = "", **options: Unpack[RecommendOptions]
    ) -> Recommendation:
        """Do what `recommend` does, in a running event loop."""
        return await self._in_thread(partial(self.recommend, picture, wish, **options))

    async def aresume(self, thread: str, **options: Unpack[ResumeOptions]) -> Recommendation:
        """Do what `resume` does, in a running event loop."""
        return await self._in_thread(partial(self.resume, thread, **options))

    async def astream(
        self, picture: PictureSource | None = None, wish: str = "", **options: Unpack[RecommendOptions]
    ) -> AsyncGenerator[Event | Recommendation, None]:
        """Yield the events as they happen; the last item is the Recommendation."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        options["on_event"] = lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)
        run = asyncio.ensure_future(self.arecommend(picture, wish, **options))
        # The thread hands on its events before it ends, so none comes behind the None.
        run.add_done_callback(lambda _: queue.put_nowait(None))
        while (event := await queue.get()) is not None:
            yield event
        yield await run

    def has_picture(self, thread: str) -> bool:
        """True if the thread has a picture, so that a wish alone can be answered."""
        return self._values(thread).get("picture") is not None

    def close(self) -> None:
        """Close the checkpoint file; pipeline and catalogue stay open."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _run(
        self, update: State | None, thread: str, stop_before: Step | None, on_event: Callable[[Event], object] | None
    ) -> Recommendation:
        events: list[Event] = []
        stops = [stop_before] if stop_before else None
        failure: QvlError | None = None
        try:
            # Written before the next node starts, so that a killed process loses at most the node it was in.
            items = self._graph.stream(
                update, self._config(thread), stream_mode="custom", interrupt_before=stops, durability="sync"
            )
            for event in cast("Iterator[Event]", items):
                events.append(event)
                if on_event is not None:
                    on_event(event)
        except QvlError as exc:
            failure = exc
        recommendation = self._recommendation(thread, events)
        if failure is None:
            return recommendation
        step = next((event.step for event in reversed(events) if event.kind == "error"), recommendation.pending or "")
        raise StepError(dataclasses.replace(recommendation, failed=step), failure) from failure

    def _recommendation(self, thread: str, events: Sequence[Event]) -> Recommendation:
        state = self._values(thread)
        return Recommendation(
            text=state.get("text", ""),
            products=tuple(map(Hit.from_json, state.get("hits", []))),
            analysis=state.get("analysis", {}),
            query=state.get("query", {}),
            evidence=state.get("evidence", {}),
            notes=tuple(state.get("notes", [])),
            written_by=state.get("written_by", "") if state.get("text") else "",
            thread=thread,
            request_id=state.get("request_id", ""),
            pending=self._next(thread),
            failed=state.get("failed") or None,
            events=tuple(events),
        )

    def _config(self, thread: str) -> RunnableConfig:
        return {"configurable": {"thread_id": thread}}

    def _values(self, thread: str) -> State:
        return cast("State", self._graph.get_state(self._config(thread)).values)

    def _next(self, thread: str) -> str | None:
        return next(iter(self._graph.get_state(self._config(thread)).next), None)

    def _analyze(self, state: State, note: Note) -> State:
        picture = state["picture"]
        if state.get("analysed") == picture and state.get("analysis"):
            note.end(cache="thread", analysis=state["analysis"])
            return {}
        outcome = self._wait(
            lambda: self.pipeline.analyze_result(
                picture, language=self.language, request_id=state["request_id"], evidence=self.evidence
            )
        )
        value, result = outcome.value, outcome.result
        attributes = dict(value.attributes)
        analysis: AnalysisRecord = {"brand": value.brand, "category": value.category, "attributes": attributes}
        if outcome.abstained:
            analysis["abstained"] = dict(outcome.abstained)
        model, tokens = f"{result.backend}:{result.model}", _tokens(result)
        note.end(cache=result.cache, analysis=analysis, confidence=outcome.confidence, tokens=tokens, model=model)
        places = {name: item.to_json() for name, item in outcome.evidence.items() if item is not None}
        return {"analysis": analysis, "analysed": picture, "evidence": places}

    def _search(self, state: State, note: Note) -> State:
        analysis, notes = state["analysis"], list(state.get("notes", []))
        if grounding.shows_nothing(analysis):
            note.end(hits=0, skipped="no product on the picture")
            return {"hits": [], "query": {}, "notes": notes}
        before = Query(**state["query"]) if state.get("query") else None
        first = next((Product.from_json(hit["product"]) for hit in state.get("hits", [])), None)
        wish = read_wish(state.get("wish", ""), self.catalog, analysis, before, first)
        query = dataclasses.replace(wish.query, picture=state.get("picture"))
        more = min(100, self.limit + 20 * bool(wish.without))
        matches = self.catalog.search(query, limit=more)
        notes += matches.notes
        if not matches.hits and query.only:
            conditions = ", ".join(f"{name} {value}" for name, value in query.only.items())
            priced = query.max_price is not None or query.min_price is not None
            matches = self.catalog.search(relaxed(query), limit=more)
            near = "; these come near" if matches.hits else ""
            notes.append(f"no product is {conditions}{' at that price' if priced else ''}{near}")
        hits = [hit for hit in matches.hits if not _has_any(hit, wish.without)][: self.limit]
        if self.judge and hits:
            hits = self._judged(state, hits, note, notes)
        record = query.to_json()
        note.end(query=record, hits=len(hits), ids=[hit.product.id for hit in hits])
        return {"query": record, "hits": [hit.to_json() for hit in hits], "notes": notes}

    def _judged(self, state: State, hits: Sequence[Hit], note: Note, notes: list[str]) -> list[Hit]:
        """Return the hits by how probably they fit the wish; as they are, with a note, if the model cannot say."""
        call = note.call("judge")
        about = judge.context(state["analysis"], state.get("wish", ""))
        ask = partial(self.pipeline.decide, state["picture"], judge.questions(hits), about)
        try:
            answers = self._wait(partial(ask, request_id=state["request_id"]))
        except QvlError as exc:
            call.fail(exc)
            notes.append(f"judge failed: {exc}; the products are in the order of the search")
            return list(hits)
        ordered = judge.ordered(hits, answers)
        new = [answer for answer in answers if answer.cache != "hit"]
        call.end(
            cache=new[0].cache if new else "hit",
            tokens=sum(answer.usage.total_tokens for answer in new),
            fits=[f"{hit.product.id} {'unknown' if hit.fit is None else f'{hit.fit:.0%}'}" for hit in ordered],
        )
        notes += [judge.UNLEARNT] * self._bundled
        return ordered

    def _answer(self, state: State, note: Note) -> State:
        analysis, hits = state["analysis"], list(map(Hit.from_json, state.get("hits", [])))
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
        facts: StepFacts = {"written_by": written_by}
        if failed:
            facts["failed"] = failed
        note.end(**facts)
        return {"text": text, "written_by": written_by, "notes": notes, "failed": failed}

    def _written(
        self, state: State, analysis: AnalysisRecord, hits: Sequence[Hit], note: Note, notes: list[str]
    ) -> str | None:
        """Return the model's text about the hits, after at most two requests; None if it names unknown products."""
        wish = state.get("wish", "")
        known = [grounding.describe(analysis), wish]
        messages = [
            {"role": "system", "content": grounding.SYSTEM},
            {"role": "user", "content": grounding.question(analysis, wish, hits)},
        ]
        wrong: str | None = None
        for attempt in range(2):
            call = note.call("model", attempt=attempt + 1)
            ask = partial(
                self.pipeline.chat, list(messages), max_tokens=MAX_ANSWER_TOKENS, request_id=state["request_id"]
            )
            try:
                result = self._wait(ask)
            except QvlError as exc:
                call.fail(exc)
                raise
            wrong = grounding.problem(result.text, hits, known, partial(self.catalog.has, "brand"))
            facts: StepFacts = {"cache": result.cache, "tokens": _tokens(result)}
            if wrong:
                facts["refused"] = wrong
            call.end(**facts)
            if wrong is None:
                return grounding.filled(result.text.strip(), hits)
            messages += [
                {"role": "assistant", "content": result.text},
                {"role": "user", "content": grounding.AGAIN.format(problem=wrong)},
            ]
        notes.append(f"the text is from a template: the model's was refused twice ({wrong})")
        return None

    def _wait(self, work: Callable[[], Coroutine[None, None, R]]) -> R:
        """Return the result of `work`, run on the pipeline's event loop."""
        if self.blocking is not None:
            return self.blocking._loop.call(work)
        if self._loop is None:
            raise ConfigError("an AsyncPipeline needs an event loop", hint="await arecommend(), or pass a Pipeline")
        waited = asyncio.run_coroutine_threadsafe(work(), self._loop)
        started = _STARTED.get()
        if started is not None:
            started.append(waited)
        return waited.result()

    async def _in_thread(self, work: Callable[[], Recommendation]) -> Recommendation:
        """Return what `work` returns in a thread; who is cancelled stops the request that the thread waits for."""
        self._loop = asyncio.get_running_loop()
        started: list[Future[Any]] = []
        token = _STARTED.set(started)
        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            for waited in started:
                waited.cancel()
            raise
        finally:
            _STARTED.reset(token)


def _tokens(result: Result) -> int:
    return result.usage.total_tokens if result.cache != "hit" else 0


def _has_any(hit: Hit, pairs: Sequence[tuple[str, str]]) -> bool:
    exact = facets(hit.product)
    return any((key(name), key(value)) in exact for name, value in pairs)
