"""`map`: the request of every picture, checked before the first, and the run over all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from qvl.errors import ConfigError
from qvl.pipeline.analyze_call import AnalyzeCall
from qvl.pipeline.check_names import check_names_of_map
from qvl.pipeline.locate_call import LocateCall
from qvl.pipeline.map_in_order import Answered, MapItem, map_in_order, unwrapped
from qvl.pipeline.parse_request import MapParams, question_messages
from qvl.pipeline.table_forms import is_table
from qvl.types import Result

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.caches.policy import CacheMode
    from qvl.pipeline.call import Call, ChatCall
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.locate_call import LocateParams
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import PictureLike, Pictures, Sources
    from qvl.pipeline.parse_request import AnalyzeParams, RequestParams

# An engine of others may look up each of these by its name.
ENGINE_DEFAULTS: Final[MapParams] = {"language": None, "keep_pictures": False, "cache": None}
# Parameters that a question or the targets of `map` do without.
OF_ANALYSES: Final = frozenset({"language", "cache", "system"})
OF_MAP: Final = frozenset({"concurrency", "progress", "keep_pictures", "engine", "replicas", "ray_address"})
ANY_PICTURE: Final = "picture.png"


class CallMaker(Protocol):
    """The part of an `AsyncPipeline` that `map` needs."""

    executor: Executor
    concurrency: int

    def chat_call(
        self, messages: Sequence[MessageLike], cache: CacheMode | None, params: RequestParams
    ) -> ChatCall: ...
    def analyze_call(self, pictures: Pictures, schema: SchemaLike | None, params: AnalyzeParams) -> AnalyzeCall: ...


class MapTask:
    """The request of every picture of a `map`: `question`, else the targets `locate`, else an analysis by `schema`.

    Raises:
        ConfigError: the arguments do not go together, or no picture could be asked so.
    """

    def __init__(
        self,
        pipeline: CallMaker,
        question: str | None,
        schema: SchemaLike | None,
        locate: str | Sequence[str] | None,
        params: MapParams,
        *,
        points: bool,
    ) -> None:
        check_names_of_map(params, MapParams.__annotations__, question=question is not None, locate=locate is not None)
        if (concurrency := params.get("concurrency")) is not None and concurrency < 1:
            raise ConfigError("concurrency must be 1 or more", param="concurrency")
        if locate is not None and (question is not None or schema is not None):
            raise ConfigError("map takes one of question, schema and locate", param="locate")
        if params.get("engine") is None and (params.keys() & {"replicas", "ray_address"}):
            raise ConfigError("replicas and ray_address are for engine='ray'", param="engine")
        self._pipeline, self._question, self._schema = pipeline, question, schema
        self._locate, self._points = locate, points
        self._own = cast("MapParams", {name: value for name, value in params.items() if name in OF_MAP})
        self._params = cast("MapParams", {name: value for name, value in params.items() if name not in OF_MAP})
        self._concurrency = concurrency or pipeline.concurrency
        # What is wrong with every picture's request is said once, and now.
        self._call(ANY_PICTURE)

    def run(self, sources: Sources) -> AsyncGenerator[MapItem[object], None]:
        """Return the items of `sources` in their order, as they come.

        Raises:
            ConfigError: `sources` are not several pictures, or there is no such engine.
        """
        if isinstance(sources, str | bytes | PathLike):
            raise ConfigError("map needs several pictures", hint="a list of them; analyze() or ask() takes one")
        if is_table(sources):
            hint = "qvl.analyze_frame(table, 'image'), or map(table['image'])"
            raise ConfigError("map needs the pictures of a table, not the table", hint=hint)
        own = self._own
        if (engine := own.get("engine")) is None:
            return self._here(sources)
        targets = {} if self._locate is None else {"locate": self._locate, "points": self._points}
        kept = {"keep_pictures": own.get("keep_pictures", False)}
        asked = {"question": self._question, "schema": self._schema, **targets}
        items: AsyncGenerator[MapItem[object], None] = self._pipeline.executor.plugins.map_engines.build(
            engine,
            self._pipeline,
            sources,
            {**asked, **ENGINE_DEFAULTS, **self._params, **kept},
            concurrency=self._concurrency,
            replicas=own.get("replicas"),
            ray_address=own.get("ray_address"),
            progress=own.get("progress", False),
        )
        return items

    def _call(self, source: Pictures) -> Call[Any]:
        """Return the Call of one picture, its arguments parsed and validated."""
        pipeline, params, locate = self._pipeline, self._params, self._locate
        if locate is None and self._question is None:
            return pipeline.analyze_call(source, self._schema, params)
        # A question, or a target, is in the language that it is written in.
        asking = {name: value for name, value in params.items() if name not in OF_ANALYSES}
        cache = params.get("cache")
        if locate is not None:
            wanted = cast("LocateParams", asking)
            return LocateCall(
                cast("PictureLike", source), locate, pipeline.executor, cache, wanted, points=self._points
            )
        messages = question_messages(source, cast("str", self._question), params.get("system"))
        return pipeline.chat_call(messages, cache, cast("RequestParams", asking))

    async def _here(self, sources: Sources) -> AsyncGenerator[MapItem[object], None]:
        """Yield the items, each asked by this process's pipeline."""
        from qvl.pipeline.analyze_document import analyze

        executor = self._pipeline.executor
        loading = [await executor.open()] if executor.backend.peek_identity() is None else []

        async def one(source: Pictures) -> tuple[Answered, Result]:
            call = self._call(source)
            answered: Answered = await (
                analyze(executor, call) if isinstance(call, AnalyzeCall) else executor.execute(call)
            )
            return answered, answered if isinstance(answered, Result) else answered.result

        keep_pictures = self._own.get("keep_pictures", False)
        async with aclosing(map_in_order(sources, one, self._concurrency, self._own.get("progress", False))) as items:
            async for item in items:
                yield unwrapped(item, loading.pop() if loading and item.ok else 0.0, keep_pictures=keep_pictures)
