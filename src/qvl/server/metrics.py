"""Prometheus metrics, under vLLM's names where the meaning is the same, so that its dashboards carry over.

Each server has a registry of its own, so metrics of two servers in one process are not summed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qvl.server.plain_metrics import PlainCounter, PlainHistogram

if TYPE_CHECKING:
    from qvl.pipeline.job import Job
    from qvl.types import Chunk, Result

_LATENCY: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0)
_BETWEEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
# What the name alone does not say.
HELP: Final = {
    "backend_step_budget_seconds": "Seconds that the last step of the local engine was allowed to take; 0: no bound.",
    "backend_step_seconds": "Seconds that the last step of the local engine took.",
}
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class BackendStats(Collector):
    """A collector of the backend's counters at the time of the scrape, as `qvl_backend_<name>`."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in sorted(self._read().items()):
            full_name = f"qvl_{name}"
            text = HELP.get(name) or f"The pipeline's {name.replace('_', ' ')}."
            family: CounterMetricFamily | GaugeMetricFamily
            if name.endswith("_total"):
                family = CounterMetricFamily(full_name.removesuffix("_total"), text)
            else:
                family = GaugeMetricFamily(full_name, text)
            family.add_metric([], value)
            yield family


class Metrics:
    """The metrics of a server. Labels never carry keys, prompts or addresses of clients."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.running = Gauge("qvl_num_requests_running", "Requests at the backend.", registry=r)
        self.waiting = Gauge("qvl_num_requests_waiting", "Requests waiting for admission or in the engine.", registry=r)
        self.ready = Gauge("qvl_ready", "1 if the server accepts requests, else 0.", registry=r)
        self.first_token = PlainHistogram(
            "qvl_time_to_first_token_seconds", "Seconds from arrival to the first token.", _FIRST, registry=r
        )
        self.between = PlainHistogram(
            "qvl_inter_token_latency_seconds", "Seconds between streamed chunks.", _BETWEEN, registry=r
        )
        self.end_to_end = PlainHistogram(
            "qvl_e2e_request_latency_seconds", "Seconds from arrival to the last token.", _LATENCY, registry=r
        )
        self.queue = PlainHistogram(
            "qvl_request_queue_time_seconds", "Seconds in the queue for the backend.", _FIRST, registry=r
        )
        self.prompt_tokens = PlainCounter("qvl_prompt_tokens", "Prompt tokens.", registry=r)
        self.image_tokens = PlainCounter("qvl_image_tokens", "Picture tokens among the prompt tokens.", registry=r)
        self.cached_tokens = PlainCounter(
            "qvl_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", registry=r
        )
        self.generation_tokens = PlainCounter("qvl_generation_tokens", "Generated tokens.", registry=r)
        self.success = PlainCounter("qvl_request_success", "Finished answers.", ["finished_reason"], registry=r)
        self.cache = PlainCounter("qvl_cache_requests", "Answers by origin.", ["state"], registry=r)
        for state in ("hit", "miss", "coalesced", "bypass"):
            self.cache.inc(0, state)
        self.pictures = PlainCounter("qvl_media_pictures", "Pictures in answered requests.", registry=r)
        self.media_errors = PlainCounter("qvl_media_errors", "Pictures that were refused.", ["code"], registry=r)
        self.rejections = PlainCounter(
            "qvl_admission_rejections", "Requests refused for overload.", ["reason"], registry=r
        )
        self.aborted = PlainCounter("qvl_requests_aborted", "Requests whose client disconnected.", registry=r)
        self.http = PlainCounter("qvl_http_requests", "HTTP answers.", ["route", "status"], registry=r)
        self.batches = Gauge("qvl_batches", "Unfinished batches.", ["status"], registry=r)
        self.batches_ended = PlainCounter("qvl_batches_ended", "Batches that ended.", ["status"], registry=r)
        self.batch_requests = PlainCounter("qvl_batch_requests", "Lines of batches.", ["outcome"], registry=r)
        self.batch_lines = Gauge("qvl_batch_requests_running", "Lines of batches under way.", registry=r)
        self.batch_bytes = Gauge("qvl_batch_disk_bytes", "Bytes of all files of batches.", registry=r)

    def on_chunk(self, job: Job, chunk: Chunk) -> None:
        """Count one chunk of the backend, and observe its time to first token or inter-token latency."""
        if not (chunk.text or chunk.reasoning or chunk.tool_calls):
            return
        now = time.perf_counter()
        last = job.stages.chunk_at
        if last:
            self.between.observe(now - last)
        else:
            self.first_token.observe(now - job.started)
        job.stages.chunk_at = now

    def on_result(self, result: Result) -> None:
        """Count one finished answer; its tokens only if the model generated it."""
        self.cache.inc(1, result.cache)
        if result.pictures:
            self.pictures.inc(len(result.pictures))
        for choice in result.choices:
            self.success.inc(1, choice.finish_reason)
        self.end_to_end.observe(result.timing.total)
        if result.cache in ("miss", "bypass"):
            usage = result.usage
            self.prompt_tokens.inc(usage.prompt_tokens)
            if usage.image_tokens:
                self.image_tokens.inc(usage.image_tokens)
            if usage.cached_tokens:
                self.cached_tokens.inc(usage.cached_tokens)
            self.generation_tokens.inc(usage.completion_tokens)

    def on_http(self, route: str, status: int) -> None:
        self.http.inc(1, route, str(status))

    def render(self) -> bytes:
        return generate_latest(self.registry)
