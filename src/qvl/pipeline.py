"""The thing a user holds: one backend, one cache, the media gate, and the verbs ask, stream, chat, analyze, map.

All logic is here and asynchronous; `qvl.blocking.Pipeline` has the same signatures for programs without a loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, overload

import anyio
from pydantic import BaseModel

from qvl import analysis, config, keys
from qvl.analysis import AnalysisResult, ProductAnalysis
from qvl.backends.base import Backend
from qvl.caches.base import Cache, CacheEntry
from qvl.errors import CacheError, ConfigError
from qvl.flight import Flight, FlightBoard, Outcome
from qvl.ids import new_id
from qvl.log import logger
from qvl.mapping import MapItem, map_in_order
from qvl.messages import MessageLike, build_request, decode_pictures
from qvl.plugins import PluginHost, split_model
from qvl.store import CacheMode, CachePolicy, Store, open_cache
from qvl.types import CacheState, ChatRequest, Chunk, Folder, Result, Timing, unfold

if TYPE_CHECKING:
    from qvl.media import MediaPolicy, PictureSource

T = TypeVar("T", bound=BaseModel)
TINY_NOTICE: Final = (
    "qvl: no model named, using the bundled tiny one: it reads qvl's own drawn product pictures (examples/pictures), "
    "not photographs. Name a real one: Pipeline('Qwen/Qwen3-VL-8B-Instruct'), --model or QVL_MODEL."
)
log = logger("qvl.pipeline")


@dataclasses.dataclass(slots=True)
class Stages:
    """Seconds spent so far, by stage; `chunk_at` is `time.perf_counter()` at the latest piece of text."""

    media: float = 0.0
    cache: float = 0.0
    queue: float = 0.0
    chunk_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Streaming:
    """An answer under way: `items` ends with the whole Result and must be closed; `origin` is where it comes from.

    `created_at` is when a cached answer was given, in seconds since the epoch; 0 for one that is new.
    """

    origin: CacheState
    items: AsyncGenerator[Chunk | Result, None]
    created_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request on its way: what to ask, under which key, and since when."""

    request: ChatRequest
    policy: CachePolicy
    manifest: Mapping[str, Any]
    key: str | None
    started: float
    stages: Stages
    task: str = "chat"
    language: str = ""
    namespace: str = ""

    @property
    def flight(self) -> tuple[str, CachePolicy] | None:
        """Who may share its work: the same question, with the same wishes for the age of its answer."""
        return None if self.key is None else (self.key, self.policy)


class AsyncPipeline:
    """Asks a model about pictures, and remembers the answers.

    Args:
        model: `"backend:model"`, a bare path or hub id (local), or None for the setting `QVL_MODEL`, else the bundled
            tiny model. The tiny model reads only pictures drawn by `qvl.tiny.render`; on a photograph it says nothing
            useful.
        backend: a Backend instance instead of a name; it is opened and closed by the pipeline.
        cache: a cache URL (`sqlite:///file.db`, `redis://…`, `memory:`, `off`), a Cache instance (closed with the
            pipeline), or None for the setting `QVL_CACHE`, else one SQLite file in the platform's cache folder.
        cache_mode: `auto` stores analyses and deterministic answers, `always` everything, `off` nothing, `refresh`
            asks anew and stores.
        cache_ttl: seconds after which an answer is forgotten; None keeps it until it is evicted.
        namespace: separates the answers of tenants that share a cache.
        language: of analyses: en, zh, pt, es.
        max_pixels: the media gate's budget for every picture, keeping its aspect ratio.
        media: the whole media policy, instead of `max_pixels`.
        concurrency: how many pictures `map` has under way.
        plugins: hook implementations beside those of installed packages.
        options: passed to the backend, such as `device="npu"` or `base_url=[…]`.

    Raises:
        ConfigError: an unknown name or option, or a value that cannot work. Weights and connections are opened on
            first use (or by `open()`), so their errors come there.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        backend: Backend | None = None,
        cache: str | Cache | None = None,
        cache_mode: CacheMode | None = None,
        cache_ttl: float | None = None,
        namespace: str | None = None,
        language: str | None = None,
        max_pixels: int | None = None,
        media: MediaPolicy | None = None,
        concurrency: int | None = None,
        plugins: Iterable[Any] = (),
        **options: Any,
    ) -> None:
        from qvl.media import MediaPolicy

        settings = config.load(
            model=model,
            cache=cache if isinstance(cache, str) else None,
            cache_mode=cache_mode,
            cache_ttl=cache_ttl,
            namespace=namespace,
            language=language,
            max_pixels=max_pixels,
            concurrency=concurrency,
        )
        if settings.concurrency < 1:
            raise ConfigError("concurrency must be 1 or more", param="concurrency")
        if model is not None and backend is not None:
            raise ConfigError("a backend instance has its model already", hint="name a model or pass a backend")
        self.plugins = PluginHost(plugins)
        self.language = analysis.check_language(settings.language)
        self.namespace = settings.namespace
        self.cache_mode: CacheMode = settings.cache_mode
        self.concurrency = settings.concurrency
        self.media = media or (
            MediaPolicy() if settings.max_pixels is None else MediaPolicy(max_pixels=settings.max_pixels)
        )
        self.backend = self._make_backend(settings.model, backend, options)
        opened = cache if isinstance(cache, Cache) else self._make_cache(settings.cache)
        self.store = Store(opened, ttl=settings.cache_ttl) if opened is not None else None
        self.admit: Callable[[Job], AbstractAsyncContextManager[Any]] = lambda job: nullcontext()
        self.on_chunk: Callable[[Job, Chunk], None] | None = None
        self._board = FlightBoard()
        self._opening: asyncio.Lock | None = None
        self._opened = False

    def _make_backend(self, model: str | None, backend: Backend | None, options: Mapping[str, Any]) -> Backend:
        if backend is not None:
            if options:
                raise ConfigError(
                    f"option {next(iter(options))!r} has no effect on a backend instance", hint="give it to the backend"
                )
            return backend
        if model is None:
            print(TINY_NOTICE, file=sys.stderr)
            return cast("Backend", self.plugins.backends.build("local", None, **options))
        name, rest = split_model(model, self.plugins.backends.factories)
        return cast("Backend", self.plugins.backends.build(name, rest, **options))

    def _make_cache(self, url: str | None) -> Cache | None:
        try:
            return open_cache(url, self.plugins.caches)
        except CacheError as exc:
            log.warning("cache cannot be opened, going on without", error=str(exc))
            return None

    async def open(self) -> None:
        """Loads weights and connects, if that has not happened yet.

        Raises:
            ConfigError: no such model, or an option that cannot work here.
            BackendError: the endpoint or device cannot be used.
        """
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if not self._opened:
                await self.backend.open()
                self._opened = True

    async def aclose(self) -> None:
        """Ends what is under way and closes backend and cache."""
        try:
            await self.backend.aclose()
        finally:
            self._opened = False
            await self._board.aclose()
            if self.store is not None:
                await self.store.aclose()

    async def __aenter__(self) -> AsyncPipeline:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def ask(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Result:
        """Answers one question about one or several pictures (none: `[]`).

        `params` are SamplingParams fields, `response_format`, `tools`, `tool_choice`, `max_pixels`, `extra`.

        Raises:
            RequestError: the pictures or parameters cannot be used.
            BackendError: the model could not answer.
        """
        return await self.chat(_question(pictures, question, system), cache=cache, **params)

    async def stream(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """As `ask`, piece by piece. Closing the generator aborts the work."""
        async with aclosing(self.stream_chat(_question(pictures, question, system), cache=cache, **params)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any) -> Result:
        """Answers a conversation: Messages, or dictionaries in OpenAI's form. Parameters as in `ask`."""
        started = time.perf_counter()
        request = await self.request(messages, **params)
        return await self.run(request, cache=cache, started=started)

    async def stream_chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any
    ) -> AsyncGenerator[Chunk, None]:
        """As `chat`, piece by piece. Closing the generator aborts the work."""
        request = await self.request(messages, **params)
        async with aclosing(self.stream_run(request, cache=cache)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, Chunk):
                    yield chunk

    @overload
    async def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> ProductAnalysis: ...
    @overload
    async def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[T],
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> T: ...
    async def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Any:
        """A typed analysis of one product, shown on one or several pictures.

        Args:
            schema: any pydantic model; None is `ProductAnalysis`.

        Raises:
            AnalysisError: the answer was no such object, also when asked again once.
        """
        found = await self.analyze_result(pictures, schema=schema, language=language, cache=cache, **params)
        return found.value

    async def analyze_result(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> AnalysisResult[Any]:
        """As `analyze`, with the Result, timing and confidences beside the value; also for custom schemas."""
        started = time.perf_counter()
        from qvl.analyzing import Analyzer

        return await Analyzer(self, schema or ProductAnalysis, language or self.language).run(
            _pictures(pictures), cache or self.cache_mode, started, params
        )

    async def map(
        self,
        sources: Iterable[PictureSource | Sequence[PictureSource]],
        question: str | None = None,
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        concurrency: int | None = None,
        progress: bool = False,
        keep_pictures: bool = False,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> AsyncGenerator[MapItem, None]:
        """Analyzes (or, with `question`, asks about) many pictures: bounded concurrency, input order.

        An item that fails has its `error`; the rest go on. What was answered before comes from the cache, so a run
        that was cut off goes on where it stopped. `progress` shows a bar. Results of a map let go of their pictures,
        whose bytes would add up, unless `keep_pictures`.
        """
        if concurrency is not None and concurrency < 1:
            raise ConfigError("concurrency must be 1 or more", param="concurrency")
        if self.backend.peek_identity() is None:
            await self.open()

        def let_go(result: Result) -> Result:
            return result if keep_pictures else dataclasses.replace(result, pictures=())

        async def one(source: PictureSource | Sequence[PictureSource]) -> tuple[Any, Result]:
            if question is not None:
                result = let_go(await self.ask(source, question, cache=cache, **params))
                return result, result
            found = await self.analyze_result(source, schema=schema, language=language, cache=cache, **params)
            result = let_go(found.result)
            if isinstance(found.value, ProductAnalysis):
                found.value.came_from(result)
            return found.value, result

        async with aclosing(map_in_order(sources, one, concurrency or self.concurrency, progress)) as items:
            async for item in items:
                yield item

    def stats(self) -> dict[str, float]:
        """Counters of backend (`backend_…`) and cache (`cache_…`), and `num_flights`, the requests under way."""
        found = {f"backend_{name}": float(value) for name, value in self.backend.stats().items()}
        found["num_flights"] = float(len(self._board))
        if self.store is not None:
            found["cache_failures"] = float(self.store.failures)
        return found

    async def request(
        self, messages: Sequence[MessageLike], *, policy: MediaPolicy | None = None, **params: Any
    ) -> ChatRequest:
        """A ChatRequest from messages and parameters, its pictures read and hashed but not decoded yet.

        Raises:
            RequestError: what cannot be served.
        """
        params.setdefault("request_id", new_request_id())
        return await build_request(messages, policy=policy or self.media, **params)

    async def run(
        self,
        request: ChatRequest,
        *,
        cache: CacheMode | CachePolicy | None = None,
        namespace: str | None = None,
        started: float | None = None,
    ) -> Result:
        """Answers a ready request through the cache. `Result.cache` says where the answer came from."""
        job = await self.job(request, cache, namespace=namespace, started=started)
        outcome, state = await self.execute(job)
        return self.finish(job, outcome, state)

    async def stream_run(
        self,
        request: ChatRequest,
        *,
        cache: CacheMode | CachePolicy | None = None,
        namespace: str | None = None,
    ) -> AsyncGenerator[Chunk | Result, None]:
        """As `run`, piece by piece; the last item is the whole Result. The first item comes with the first token."""
        job = await self.job(request, cache, namespace=namespace)
        streaming = await self.start(job)
        async with aclosing(streaming.items) as items:
            async for item in items:
                yield item

    async def start(self, job: Job) -> Streaming:
        """Begins to answer `job`: what `stream_run` does, for those who must know the origin before the first piece."""
        hit = await self.look_up(job)
        if hit is not None:
            return Streaming("hit", self._replay(job, hit), hit.result.created_at)
        flight, joined = self._board.join(job.flight, self._answering(job))
        origin: CacheState = "coalesced" if joined else "miss" if job.key is not None else "bypass"
        return Streaming(origin, self._follow(job, flight, joined))

    async def _replay(self, job: Job, hit: Outcome) -> AsyncGenerator[Chunk | Result, None]:
        for chunk in unfold(hit.result):
            yield chunk
        yield self.finish(job, hit, "hit")

    async def _follow(self, job: Job, flight: Flight, joined: bool) -> AsyncGenerator[Chunk | Result, None]:
        async with aclosing(flight.chunks()) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield item
                else:
                    yield self.finish(job, item, _state(job, item, joined))

    async def job(
        self,
        request: ChatRequest,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        started: float | None = None,
        task: str = "chat",
        language: str = "",
        prompt_version: str = "",
    ) -> Job:
        """A request with its key. Opens the backend unless it can tell its identity without."""
        now = time.perf_counter()
        policy = (
            cache
            if isinstance(cache, CachePolicy)
            else CachePolicy.of(
                cache or self.cache_mode, deterministic=task == "analyze" or request.sampling.deterministic
            )
        )
        if self.store is None:
            policy = CachePolicy(read=False, write=False)
        identity = None if self._opened or not policy.used else self.backend.peek_identity()
        if identity is None:
            await self.open()
            identity = self.backend.identity()
        space = self.namespace if namespace is None else namespace
        manifest = keys.build_manifest(
            request,
            identity=identity,
            max_pixels=self.media.max_pixels,
            task=task,
            prompt_version=prompt_version,
            language=language,
            namespace=space,
        )
        return Job(
            request=request,
            policy=policy,
            manifest=manifest,
            key=keys.hash_manifest(manifest) if policy.used else None,
            started=started if started is not None else now,
            stages=Stages(media=now - started if started is not None else 0.0),
            task=task,
            language=language,
            namespace=space,
        )

    async def look_up(self, job: Job) -> Outcome | None:
        """The cached outcome of `job`, if its policy allows and there is one."""
        if self.store is None or job.key is None or not job.policy.read:
            return None
        began = time.perf_counter()
        entry = await self.store.get(job.key, max_age=job.policy.max_age)
        found = None if entry is None else _from_entry(entry)
        job.stages.cache += time.perf_counter() - began
        return found

    async def execute(
        self, job: Job, work: Callable[[Job, Callable[[Chunk], None]], Any] | None = None
    ) -> tuple[Outcome, CacheState]:
        """The outcome of `job` from the cache, from a flight under way, or from the backend."""
        hit = await self.look_up(job)
        if hit is not None:
            return hit, "hit"
        flight, joined = self._board.join(job.flight, self._answering(job, work))
        outcome = await flight.outcome()
        return outcome, _state(job, outcome, joined)

    def finish(self, job: Job, outcome: Outcome, state: CacheState) -> Result:
        """The Result as this caller sees it: its own request id, cache state and timing."""
        total = time.perf_counter() - job.started
        timing = outcome.result.timing if state in ("miss", "bypass") else Timing()
        result = dataclasses.replace(
            outcome.result,
            timing=dataclasses.replace(
                timing,
                media=job.stages.media,
                cache=job.stages.cache,
                queue=timing.queue + job.stages.queue,
                total=total,
            ),
            cache=state,
            request_id=job.request.request_id,
            key=job.key,
            pictures=job.request.pictures,
        )
        for hook in self.plugins.hook.response_done.get_hookimpls():
            try:
                hook.function(*[{"request": job.request, "result": result}[name] for name in hook.argnames])
            except Exception as exc:  # noqa: BLE001 - an outsider's hook must not cost the user the answer
                log.warning("plugin failed after the response", plugin=hook.plugin_name, error=str(exc))
        log.info(
            "request done",
            request_id=result.request_id,
            task=job.task,
            cache=state,
            seconds=round(total, 4),
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
        )
        return result

    def _answering(
        self, job: Job, work: Callable[[Job, Callable[[Chunk], None]], Any] | None = None
    ) -> Callable[[Callable[[Chunk], None]], Any]:
        async def answer(emit: Callable[[Chunk], None]) -> Outcome:
            lease = None
            if self.store is not None and job.key is not None:
                lease, entry = await self.store.lease_or_entry(
                    job.key, read=job.policy.read, max_age=job.policy.max_age
                )
                if entry is not None and (found := _from_entry(entry)) is not None:
                    for chunk in unfold(found.result):
                        emit(chunk)
                    return dataclasses.replace(found, origin="cache")
            try:
                async with self.admit(job):
                    ready = await self.decoded(job)
                    outcome = cast("Outcome", await (work or self.generate)(ready, emit))
                if self.store is not None and job.key is not None and job.policy.write and outcome.result.complete:
                    began = time.perf_counter()
                    await self.store.set(job.key, _to_entry(ready, outcome))
                    job.stages.cache += time.perf_counter() - began
                return outcome
            finally:
                if lease is not None and self.store is not None:
                    with anyio.CancelScope(shield=True):
                        await self.store.release(lease)

        return answer

    async def decoded(self, job: Job) -> Job:
        """The job with its pictures in canonical form; the time goes to the media stage."""
        began = time.perf_counter()
        request = await decode_pictures(job.request)
        job.stages.media += time.perf_counter() - began
        return dataclasses.replace(job, request=request)

    async def generate(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        """Streams the backend's answer into `emit` and folds it."""
        await self.open()
        began = time.perf_counter()
        folder = Folder(want_logprobs=job.request.sampling.logprobs is not None)
        async with aclosing(self.backend.stream(job.request)) as chunks:
            async for chunk in chunks:
                folder.add(chunk)
                emit(chunk)
                if self.on_chunk is not None:
                    self.on_chunk(job, chunk)
        timing = folder.timing
        if not timing.total:
            timing = dataclasses.replace(timing, total=time.perf_counter() - began)
        return Outcome(
            Result(
                choices=folder.choices(),
                usage=folder.usage,
                timing=timing,
                model=self.backend.model,
                backend=self.backend.name,
                created_at=time.time(),
            )
        )


def new_request_id() -> str:
    return f"qvl-{new_id()}"


def _pictures(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _question(pictures: Any, question: str, system: str | None) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": picture} for picture in _pictures(pictures))]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _state(job: Job, outcome: Outcome, joined: bool) -> CacheState:
    if joined:
        return "coalesced"
    if outcome.origin == "cache":
        return "hit"
    return "miss" if job.key is not None else "bypass"


def _to_entry(job: Job, outcome: Outcome) -> CacheEntry:
    result = outcome.result
    pictures = job.request.pictures
    return CacheEntry(
        result={**keys.result_to_json(result), "confidence": dict(outcome.confidence)},
        manifest=job.manifest,
        image_hash=pictures[0].sha256 if pictures else "",
        task=job.task,
        language=job.language,
        model=result.model,
        namespace=job.namespace,
        text=result.text,
        analysis=outcome.analysis,
        usage=dataclasses.asdict(result.usage),
        created_at=result.created_at or time.time(),
    )


def _from_entry(entry: CacheEntry) -> Outcome | None:
    try:
        result = keys.result_from_json(entry.result)
    except CacheError as exc:
        log.warning("cached answer left out", error=str(exc))
        return None
    return Outcome(result, entry.analysis, entry.result.get("confidence") or {}, "cache")
