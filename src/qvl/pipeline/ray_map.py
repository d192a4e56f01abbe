"""`Pipeline.map(engine="ray")`: a dataset through Ray Data, one actor per device, each with a pipeline of its own.

The actors share only the pipeline's cache, so an interrupted run can be resumed, and answers of a lost actor are not
computed again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from qvl.backends.ray import cluster
from qvl.config import in_home
from qvl.errors import BackendError, ConfigError, QvlError
from qvl.pipeline.map_in_order import MapItem

if TYPE_CHECKING:
    from pyarrow import Table
    from ray.data import Dataset

    from qvl.caches.policy import CacheMode
    from qvl.calibration.abstain import Thresholds
    from qvl.calibration.calibration_file import Calibration
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.parse_parts import Pictures
    from qvl.types import JsonMapping

# Two batches at a time: while one waits for its slowest picture, the engine works on the other.
BATCHES_AT_ONCE: Final = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """The picklable arguments from which another process creates an equal pipeline.

    Attributes:
        dtype: what the backend computes in if it runs on the CPU here; None if that is not known.
    """

    model: str | None
    options: JsonMapping
    plugins: tuple[object, ...]
    cache: str
    cache_mode: CacheMode
    cache_ttl: float | None
    namespace: str
    language: str
    media: MediaPolicy
    calibration: Calibration | None
    abstain: Thresholds | None
    dtype: str | None

    @classmethod
    def of(cls, pipeline: AsyncPipeline) -> Recipe:
        """Return the recipe of `pipeline`; raise ConfigError if it cannot be recreated in another process."""
        if pipeline.made_of is None:
            raise ConfigError(
                "engine='ray' cannot send a backend instance to its worker processes",
                hint="name the model: Pipeline('Qwen/Qwen3-VL-8B-Instruct'), or register the backend by a plugin",
                param="engine",
            )
        model, options, plugins, cache = pipeline.made_of
        executor, store = pipeline.executor, pipeline.executor.store
        if store is not None and store.cache.url == "memory:":
            cluster.log.warning("the cache memory: is per process; no answers are shared or kept")
        return cls(
            model=model,
            options=options,
            plugins=plugins,
            # Relative paths and defaults are looked up here and not where a worker happens to stand.
            cache="off" if store is None else cache if cache and _keeps_a_secret(cache) else store.cache.url,
            cache_mode=executor.cache_mode,
            cache_ttl=None if store is None else store.ttl,
            namespace=executor.namespace,
            language=pipeline.language,
            media=executor.media,
            calibration=None if executor.calibrator is None else executor.calibrator.calibration,
            abstain=None if executor.calibrator is None else executor.calibrator.abstain,
            dtype=_dtype(pipeline.backend.peek_identity()),
        )


class Worker:
    """A Ray actor with a pipeline on one device. Ray Data calls it with batches of pickled sources."""

    def __init__(self, packed: bytes, kind: str, replicas: int) -> None:
        from ray import cloudpickle

        from qvl.backends.ray.replica import build
        from qvl.pipeline.sync_pipeline import Pipeline

        recipe: Recipe
        recipe, self._call = cloudpickle.loads(packed)
        self._pipeline = Pipeline(
            backend=build(recipe.model, recipe.options, kind, replicas, recipe.plugins, recipe.dtype),
            cache=recipe.cache,
            cache_mode=recipe.cache_mode,
            cache_ttl=recipe.cache_ttl,
            namespace=recipe.namespace,
            language=recipe.language,
            media=recipe.media,
            calibration=recipe.calibration,
            abstain=recipe.abstain,
            plugins=recipe.plugins,
        )

    def __call__(self, table: Table) -> Table:
        import pyarrow
        from ray import cloudpickle

        sources = [cloudpickle.loads(source) for source in table["source"].to_pylist()]
        try:
            items: list[MapItem[object] | QvlError] = [
                replace(item, source=None) for item in self._pipeline.map(sources, **self._call)
            ]
        except QvlError as exc:
            # No picture's fault: the model cannot be opened, or an argument cannot work.
            items = [exc] * len(sources)
        packed = [cloudpickle.dumps(item) for item in items]
        return pyarrow.table({"index": table["index"], "item": pyarrow.array(packed, pyarrow.large_binary())})


async def map_under_ray(
    pipeline: AsyncPipeline,
    sources: Iterable[Pictures],
    call: JsonMapping,
    *,
    concurrency: int,
    replicas: int | None,
    ray_address: str | None,
    progress: bool,
) -> AsyncGenerator[MapItem[object], None]:
    """Yield the items of `AsyncPipeline.map`, computed by Ray actors; `call` has the arguments for the actors' `map`.

    All sources are read before the run starts. Files must be at the same path on every host.

    Raises:
        ConfigError: the pipeline or an argument does not support Ray.
        BackendError: the cluster cannot be joined, or Ray Data failed.
    """
    device = str((pipeline.made_of[1] if pipeline.made_of else {}).get("device", "auto")).partition(":")[0]
    devices = device if device in cluster.DEVICES else "cpu"
    cluster.check_settings(1 if replicas is None else replicas, devices, ray_address)
    cluster.require_ray("ray.data")
    recipe = Recipe.of(pipeline)
    arguments = list(sources)
    if not arguments:
        return
    run = _Run(recipe, call, arguments, concurrency, replicas, devices, ray_address)
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=len(arguments), unit="picture", file=sys.stderr)
    try:
        try:
            await asyncio.to_thread(run.join)
        finally:
            cluster.take_back_sigterm()
        while (items := await asyncio.to_thread(run.take)) is not None:
            for item in items:
                if bar is not None:
                    bar.update()
                yield replace(item, source=arguments[item.index])
    finally:
        if bar is not None:
            bar.close()
        await asyncio.shield(asyncio.to_thread(run.end))


@dataclass(slots=True)
class _Run:
    """One execution of the dataset. Its methods block, and may be called from any thread.

    `end` does not wait for another one, which nothing can interrupt. That one then ends the run itself, since Ray would
    connect a process anew that has left while it was at work.
    """

    recipe: Recipe
    call: JsonMapping
    sources: Sequence[Pictures]
    concurrency: int
    replicas: int | None
    devices: str
    address: str | None
    tables: Iterator[Table] | None = None
    joined: bool = False
    busy: bool = False
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self) -> None:
        """Connect to the cluster."""
        with self._at_work() as goes_on:
            if goes_on:
                cluster.join(self.address)
                self.joined = True

    def take(self) -> list[MapItem[object]] | None:
        """Return the next items in input order, or None at the end."""
        from ray import cloudpickle
        from ray.exceptions import RayError

        try:
            with self._at_work() as goes_on:
                if not goes_on:
                    return None
                if self.tables is None:
                    self.tables = iter(self._dataset().iter_batches(batch_size=None, batch_format="pyarrow"))
                table = next(self.tables, None)
        except RayError as exc:
            reason = str(exc).strip().splitlines()
            raise BackendError(f"Ray Data failed: {reason[-1] if reason else type(exc).__name__}"[:400]) from exc
        if table is None:
            return None
        items = []
        for index, packed in zip(table["index"].to_pylist(), table["item"].to_pylist(), strict=True):
            item = cloudpickle.loads(packed)
            if isinstance(item, QvlError):
                raise item
            items.append(replace(item, index=index))
        return items

    @contextmanager
    def _at_work(self) -> Iterator[bool]:
        """A context in which `end` leaves the cluster to this thread; yields False if the run has ended."""
        with self.lock:
            self.busy = not self.ended
        try:
            yield self.busy
        finally:
            with self.lock:
                left = self.busy and self.ended
                self.busy = False
            if left:
                self._leave()

    def _dataset(self) -> Dataset:
        import ray.data
        from ray import cloudpickle

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        actors = self.replicas or cluster.count(self.devices)
        share = cluster.room(actors, self.devices)
        # Small enough that every actor has work, and a lost one has little to do again.
        batch = max(1, min(self.concurrency, math.ceil(len(self.sources) / (actors * BATCHES_AT_ONCE))))
        call = {**self.call, "concurrency": max(1, math.ceil(self.concurrency / BATCHES_AT_ONCE))}
        rows = [
            {"index": index, "source": cloudpickle.dumps(_portable(source))}
            for index, source in enumerate(self.sources)
        ]
        dataset = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / batch))
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        return dataset.map_batches(
            Worker,
            batch_size=batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=BATCHES_AT_ONCE,
                max_concurrent_calls_per_actor=BATCHES_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(cloudpickle.dumps((self.recipe, call)), share.kind, actors),
            **share.actor_options(),
        )

    def end(self) -> None:
        """Cancel the run, and disconnect from the cluster as soon as nothing is at work."""
        with self.lock:
            self.ended = True
            if self.busy:
                return
        self._leave()

    def _leave(self) -> None:
        try:
            close = getattr(self.tables, "close", None)
            if close is not None:
                close()
            self.tables = None
        finally:
            if self.joined:
                self.joined = False
                cluster.leave()


def _dtype(identity: JsonMapping | None) -> str | None:
    found = (identity or {}).get("dtype")
    return found if isinstance(found, str) else None


def _keeps_a_secret(cache: str) -> bool:
    """True if the URL of the cache has a password, which its open store hides."""
    return "://" in cache and not cache.startswith("sqlite:")


def _portable(source: object) -> object:
    """Return a source that another process can read: absolute paths, bytes instead of open files."""
    if isinstance(source, list | tuple):
        return [_portable(one) for one in source]
    if isinstance(source, os.PathLike):
        return in_home(source).absolute()
    if isinstance(source, str):
        return source if source.partition(":")[0] in ("http", "https", "data", "file") else os.path.abspath(source)
    return source.read() if hasattr(source, "read") else source
