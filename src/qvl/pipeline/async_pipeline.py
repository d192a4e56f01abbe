"""`AsyncPipeline`: one backend, one cache, the media gate, and the methods ask, stream, chat, analyze, read and map.

Each method makes a `Call`, which the `Executor` executes; `qvl.pipeline.sync_pipeline.Pipeline` has the same
signatures for programs without an event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Unpack, overload

from typing_extensions import TypeVar

from qvl import analysis, config
from qvl.analysis.product import AnalysisResult, ProductAnalysis
from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.caches.open import cache_named
from qvl.caches.policy import CacheMode
from qvl.errors import ConfigError
from qvl.pipeline.cache_store import Store
from qvl.pipeline.call import ChatCall
from qvl.pipeline.check_names import check_names
from qvl.pipeline.executor import Executor
from qvl.pipeline.make_parts import make_backend, make_cache
from qvl.pipeline.map_results import AsyncMapResults
from qvl.pipeline.parse_message import MessageLike
from qvl.pipeline.parse_request import (
    OF_REQUEST,
    SAMPLING_NAMES,
    AnalyzeParams,
    MapParams,
    RequestParams,
    listed,
    question_messages,
)
from qvl.plugins.host import PluginHost
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.calibration.abstain import AbstainLike
    from qvl.calibration.calibration_file import Calibration
    from qvl.decisions.answers import Decisions
    from qvl.decisions.questions import QuestionLike
    from qvl.evidence.located import Locations
    from qvl.evidence.page_text import ReadForm
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.analyze_call import AnalyzeCall
    from qvl.pipeline.decide_call import DecideParams
    from qvl.pipeline.locate_call import LocateParams
    from qvl.pipeline.parse_parts import PictureLike, Pictures, Sources
    from qvl.pipeline.read_pages import ReadPage

A = TypeVar("A", default=ProductAnalysis)
TINY_NOTICE: Final = (
    "qvl: no model named, so the bundled tiny one answers: it reads qvl's own drawn product pictures "
    "(examples/pictures), not photographs. Name a real one: --model Qwen/Qwen3-VL-8B-Instruct, QVL_MODEL, "
    "or Pipeline('Qwen/Qwen3-VL-8B-Instruct')."
)


class AsyncPipeline:
    """Ask a model about pictures, and cache the answers.

    Args:
        model: `"backend:model"`, a bare path or hub id (local), or None for the setting `QVL_MODEL`, else the bundled
            tiny model. The tiny model reads only pictures drawn by `qvl.tiny.render`; on a photograph it says nothing
            useful.
        backend: a Backend instance instead of a name; the pipeline opens and closes it.
        cache: a cache URL (`sqlite:///file.db`, `redis://…`, `memory:`, `off`), a Cache instance (open already, so
            yours to close; several pipelines may share it), or None for the setting `QVL_CACHE`, else one SQLite file
            in the platform's cache folder.
        cache_mode: `auto` stores analyses and deterministic answers, `always` everything, `off` nothing, `refresh`
            skips the lookup and stores the new answer.
        cache_ttl: seconds after which an answer is forgotten; None keeps it until it is evicted.
        namespace: separates the answers of tenants that share a cache.
        language: the language of analyses: en, zh, pt, es.
        max_pixels: the media gate's budget for every picture, keeping its aspect ratio.
        min_pixels: pictures with fewer pixels are upscaled, as by Qwen's smart_resize.
        media: the whole media policy, instead of `max_pixels` and `min_pixels`.
        concurrency: the number of pictures that `map` works on at a time.
        calibration: what `qvl calibrate` wrote, for this model: confidences then say how often such answers are right.
        abstain: the least confidence at which an answer is told, for every field and question or for each named one;
            needs a calibration.
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
        min_pixels: int | None = None,
        media: MediaPolicy | None = None,
        concurrency: int | None = None,
        calibration: str | PathLike[str] | Calibration | None = None,
        abstain: AbstainLike | None = None,
        plugins: Iterable[object] = (),
        **options: object,
    ) -> None:
        from qvl.calibration.calibrator import open_calibrator
        from qvl.media.policy import MediaPolicy

        instance = cache if isinstance(cache, Cache) else None
        settings = config.load(
            model=model,
            cache=None if isinstance(cache, Cache) else cache_named(cache),
            cache_mode=cache_mode,
            cache_ttl=cache_ttl,
            namespace=namespace,
            language=language,
            max_pixels=max_pixels,
            min_pixels=min_pixels,
            concurrency=concurrency,
        )
        if settings.concurrency < 1:
            raise ConfigError("concurrency must be 1 or more", param="concurrency")
        if model is not None and backend is not None:
            raise ConfigError("model= and backend= exclude each other", hint="pass one; a backend has its model")
        plugins = tuple(plugins)
        host = PluginHost(plugins)
        # What another process needs to make the same pipeline; None where a backend instance was given.
        self.made_of = (
            None if backend is not None else (settings.model, options, plugins, None if instance else settings.cache)
        )
        self.language = analysis.check_language(settings.language)
        self.concurrency = settings.concurrency
        budget = MediaPolicy().with_sizes(settings.max_pixels, settings.min_pixels)
        self.backend = make_backend(host, settings.model, backend, options)
        # Before the cache is opened, which nobody would close.
        calibrator = open_calibrator(calibration, abstain, self.backend.peek_identity)
        opened = make_cache(host, settings.cache) if instance is None else instance
        self.executor = Executor(
            self.backend,
            None if opened is None else Store(opened, ttl=settings.cache_ttl, owned=instance is None),
            host,
            media or budget,
            namespace=settings.namespace,
            cache_mode=settings.cache_mode,
            notice=TINY_NOTICE if settings.model is None and backend is None else "",
        )
        if calibrator is not None:
            calibrator.identity = self.executor.identity
            self.executor.calibrator = calibrator

    def __repr__(self) -> str:
        store = self.executor.store
        cache = "off" if store is None else store.cache.url
        return f"<{type(self).__name__} {self.backend.name}:{self.backend.model} cache={cache}>"

    async def __aenter__(self) -> AsyncPipeline:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Load weights and connect, if that has not happened yet.

        Raises:
            ConfigError: no such model, or an option that cannot work here.
            BackendError: the endpoint or device cannot be used.
        """
        await self.executor.open()

    async def aclose(self) -> None:
        """Cancel running work and close the backend, and the cache unless it was passed as an instance.

        A backend that does not close within 30 seconds is abandoned.
        """
        await self.executor.aclose()

    async def ask(
        self,
        pictures: Pictures,
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> Result:
        """Return the answer to one question about one or several pictures (none: `[]`).

        `params` are SamplingParams fields, `response_format`, `tools`, `tool_choice`, `extra`, and `max_pixels` and
        `min_pixels`, the limits of Qwen's smart_resize for every picture. A picture may also be a part as in `chat`.

        Raises:
            RequestError: the pictures or parameters cannot be used.
            BackendError: the model could not answer.
        """
        return await self.chat(question_messages(pictures, question, system), cache=cache, **params)

    async def stream(
        self,
        pictures: Pictures,
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of `ask` piece by piece. Closing the generator aborts the work."""
        messages = question_messages(pictures, question, system)
        async with aclosing(self.stream_chat(messages, cache=cache, **params)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Unpack[RequestParams]
    ) -> Result:
        """Return the answer to a conversation of Messages, or dictionaries in OpenAI's form; parameters as in `ask`."""
        return await self.executor.execute(self.chat_call(messages, cache, params))

    async def stream_chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Unpack[RequestParams]
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of `chat` piece by piece. Closing the generator aborts the work."""
        async with aclosing(self.executor.stream(self.chat_call(messages, cache, params))) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, Chunk):
                    yield chunk

    @overload
    async def analyze(
        self, pictures: Pictures, *, schema: type[A] | None = None, **params: Unpack[AnalyzeParams]
    ) -> A: ...
    @overload
    async def analyze(
        self, pictures: Pictures, *, schema: SchemaLike | None, **params: Unpack[AnalyzeParams]
    ) -> Any: ...
    async def analyze(
        self, pictures: Pictures, *, schema: SchemaLike | None = None, **params: Unpack[AnalyzeParams]
    ) -> object:
        """Return a typed analysis of one product, shown on one or several pictures.

        Args:
            pictures: of one product; or a document, whose pages are one request within the policy's
                `max_document_pixels`, else one each. Then a value holds that the surest page tells (the first, where
                no page says how sure it is), lists are joined in the order of pages, and `pages` of `analyze_result`
                says where each was found.
            schema: a pydantic class, a dataclass, a TypedDict, another type that pydantic reads, or a JSON schema,
                whose answers are plain dictionaries. None is `ProductAnalysis`.
            params: `language` (the pipeline's unless named), `cache`, and parameters as in `ask`. `evidence=True` asks
                in the same answer for the box of each field: `evidence` of a ProductAnalysis and of `analyze_result`.
                `abstain` is the least confidence to be told; `calibrated` as of `AnalyzeParams`.

        Raises:
            AnalysisError: the answer does not fit the schema, nor does a second one.
        """
        return (await self.analyze_result(pictures, schema=schema, **params)).value

    @overload
    async def analyze_result(
        self, pictures: Pictures, *, schema: type[A] | None = None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[A]: ...
    @overload
    async def analyze_result(
        self, pictures: Pictures, *, schema: SchemaLike | None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[Any]: ...
    async def analyze_result(
        self, pictures: Pictures, *, schema: SchemaLike | None = None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[object]:
        """Return the value of `analyze` with its Result, timing and confidences; also for custom schemas."""
        from qvl.pipeline.analyze_document import analyze

        return await analyze(self.executor, self.analyze_call(pictures, schema, params))

    def chat_call(self, messages: Sequence[MessageLike], cache: CacheMode | None, params: RequestParams) -> ChatCall:
        """Return the Call of `chat`, its arguments parsed and validated."""
        check_names("", params, RequestParams.__annotations__, "system", "cache")
        return ChatCall(messages, cache, params)

    def analyze_call(self, pictures: Pictures, schema: SchemaLike | None, params: AnalyzeParams) -> AnalyzeCall:
        """Return the Call of `analyze_result`, its arguments parsed and validated."""
        from qvl.pipeline.analyze_call import AnalyzeCall

        check_names("analyze", params, OF_REQUEST | SAMPLING_NAMES, "schema")
        return AnalyzeCall(
            listed(pictures),
            schema=ProductAnalysis if schema is None else schema,
            language=params.get("language") or self.language,
            backend=self.backend,
            cache=params.get("cache"),
            params=params,
            calibrator=self.executor.calibrator if params.get("calibrated", True) else None,
        )

    async def decide(
        self,
        pictures: Pictures,
        questions: QuestionLike | Iterable[QuestionLike],
        context: str | Sequence[MessageLike] | None = None,
        *,
        cache: CacheMode | None = None,
        **params: Unpack[DecideParams],
    ) -> Decisions:
        """Return how probable each possible answer to each question is, in the order of the questions.

        Args:
            pictures: one, several, or none (`[]`).
            questions: one or up to 400 of `qvl.decisions.Predicate`, `Choice` and `Score`, a text (a Predicate), or a
                mapping in OpenAI's form. Each is kept in the cache for itself.
            context: text, or messages, that all questions are asked about beside the pictures.
            params: `max_pixels`, `min_pixels`, `extra`, `request_id` and others as in `ask`; `abstain`, the least
                confidence to be told, of every question or by name.

        Raises:
            RequestError: a question or a picture cannot be used.
            BackendError: the model could not answer.
        """
        from qvl.decisions.questions import read_questions
        from qvl.pipeline.decide import decide
        from qvl.pipeline.decide_call import shared_messages

        messages, asked = shared_messages(pictures, context), read_questions(questions)
        return (await decide(self.executor, messages, asked, cache, params))[0]

    async def locate(
        self,
        picture: PictureLike,
        targets: str | Iterable[str],
        *,
        points: bool = False,
        cache: CacheMode | None = None,
        **params: Unpack[LocateParams],
    ) -> Locations:
        """Return where on the picture the targets are: a list of `Located`, each with a box (or point) and confidence.

        Boxes are in pixels of the original picture, EXIF applied. One that reaches beyond the picture is cut at its
        edges and `clipped`; one that lies outside is left out. Either way a note of the result says so.

        Args:
            picture: one.
            targets: a text such as "the brand", or up to 100 of them, asked together in one request.
            points: ask for a point on each instead of a box around it.
            params: `max_tokens`, `max_pixels`, `min_pixels`, `extra`, `request_id` and others as in `ask`.

        Raises:
            RequestError: the picture cannot be used, or the backend takes none.
            AnalysisError: the answer has no boxes.
            BackendError: the model could not answer.
        """
        from qvl.pipeline.locate_call import LocateCall

        call = LocateCall(picture, targets, self.executor, cache, params, points=points)
        return await self.executor.execute(call)

    async def read(
        self,
        document: PictureLike,
        *,
        form: ReadForm = "markdown",
        concurrency: int | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> AsyncGenerator[ReadPage, None]:
        """Yield the text of a document (or picture) page by page, in order; one that fails has its `error`.

        Args:
            document: a PDF or a picture, as in `ask`.
            form: "markdown", or "html" with the box of each element (`data-bbox`, thousandths of the page).
            concurrency: pages under way at a time; the pipeline's unless named.
            params: `pages`, `max_tokens` (4096 a page unless named) and others as in `ask`. Each page is kept in the
                cache, so that a run which was broken off goes on where it was.

        Raises:
            MediaError: the document cannot be opened, or has no such page.
        """
        from qvl.pipeline.read_pages import read_pages_of

        check_names("read", params, RequestParams.__annotations__, "form", "concurrency", "cache")
        most = concurrency or self.concurrency
        async with aclosing(read_pages_of(self.executor, document, form, most, cache, params)) as pages:
            async for page in pages:
                yield page

    @overload
    def map(self, sources: Sources, question: str, **params: Unpack[MapParams]) -> AsyncMapResults[Result]: ...
    @overload
    def map(
        self, sources: Sources, question: None = None, *, schema: type[A] | None = None, **params: Unpack[MapParams]
    ) -> AsyncMapResults[A]: ...
    @overload
    def map(
        self, sources: Sources, *, locate: str | Sequence[str], points: bool = False, **params: Unpack[MapParams]
    ) -> AsyncMapResults[Locations]: ...
    @overload
    def map(
        self, sources: Sources, question: str | None = None, *, schema: SchemaLike | None, **params: Unpack[MapParams]
    ) -> AsyncMapResults[Any]: ...
    def map(
        self,
        sources: Sources,
        question: str | None = None,
        *,
        schema: SchemaLike | None = None,
        locate: str | Sequence[str] | None = None,
        points: bool = False,
        **params: Unpack[MapParams],
    ) -> AsyncMapResults[object]:
        """Yield an item per picture in input order: analyzed, asked `question`, or with what `locate` names located.

        An item that fails has its `error`; the others continue. What is wrong with the request of every picture is
        raised at once (ConfigError). Earlier answers come from the cache, so an interrupted run can be resumed.
        `progress` shows a progress bar. Results drop their pictures to save memory, unless `keep_pictures`.

        `engine="ray"` works through Ray Data: one actor a device, or `replicas` of them, on this machine or in the
        cluster at `ray_address` ("auto" or HOST:PORT). `concurrency` is then per actor, and `sources` must be finite.
        Only the actors load the model, unless `open()` or `with` loads it in this process as well.

        What is returned is also a table, when read to its end: `.to_pandas()`, `.to_polars()`, `.to_dataset()`,
        `.to_parquet(path)` (the extra `data`) and `.to_csv(path)`.
        """
        from qvl.pipeline.map_pictures import MapTask

        task = MapTask(self, question, schema, locate, params, points=points)
        return AsyncMapResults(task.run(sources))

    def stats(self) -> dict[str, float]:
        """Return the counters of backend (`backend_…`) and cache (`cache_…`) and `num_flights`, the running flights."""
        return self.executor.stats()
