"""The options of `qvl bench run`, and the target, load plan and dataset that they describe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure
from qvl.cli.parse_args import pairs
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.bench.dataset import Dataset
    from qvl.bench.plan import LoadPlan
    from qvl.bench.run import Target
    from qvl.types import JsonObject

_input = partial(typer.Option, rich_help_panel="What to ask")
_load = partial(typer.Option, rich_help_panel="How to load")
_output = partial(typer.Option, rich_help_panel="What to leave")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `qvl bench run`."""

    url: Annotated[list[str] | None, typer.Option(help="Base URL: host:8000, …/v1; several are compared.")] = None
    endpoints: Annotated[
        list[str] | None, typer.Option(metavar="URL,URL", help="Spread one load over these; repeatable.")
    ] = None
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the first that it lists.")] = None
    api_key: Annotated[str | None, typer.Option(envvar=["QVL_API_KEY", "OPENAI_API_KEY"], help="Its key.")] = None
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A further header.")] = None
    target: Annotated[str, _input(help="chat, responses, completions, messages or decisions.")] = "chat"
    data: Annotated[
        list[str] | None, _input("--data", "-d", help="JSONL, JSON, CSV, txt, parquet, .gz; repeatable.")
    ] = None
    picture: Annotated[
        list[str] | None, _input("--picture", "-f", help="One request with this picture; repeat for more.")
    ] = None
    synthetic: Annotated[int | None, _input(min=1, help="So many different drawn pictures.")] = None
    size: Annotated[str, _input(help="Of drawn pictures, WxH.")] = "512x512"
    prompt: Annotated[str, _input(help="The question for pictures without one.")] = "Describe it."
    base_dir: Annotated[Path | None, _input(help="Where relative picture paths start.")] = None
    strict: Annotated[bool, _input(help="Stop at the first bad line.")] = False
    max_pixels: Annotated[int | None, _input(min=1024, help="Budget of one picture.")] = None
    min_pixels: Annotated[int | None, _input(min=1, help="Smaller pictures are made larger.")] = None
    max_tokens: Annotated[int | None, _input(min=1, help="Longest answer, of every request.")] = None
    param: Annotated[list[str] | None, _input("--param", "-p", metavar="NAME=VALUE", help="temperature=0 ...")] = None
    stream: Annotated[bool, _input(help="Ask for streams (TTFT needs them).")] = True
    concurrency: Annotated[
        int | None, _load("--concurrency", "-c", min=1, help="Clients; with --rate the most in flight.")
    ] = None
    rate: Annotated[float | None, _load(help="Open loop: requests/s, latency from the intended start.")] = None
    arrival: Annotated[str, _load(help="poisson or constant.")] = "poisson"
    ramp: Annotated[float, _load(help="Seconds until all clients run.")] = 0.0
    sweep: Annotated[bool, _load("--sweep", help="1, 2, 4 ... clients until throughput stops growing.")] = False
    adaptive: Annotated[bool, _load("--adaptive", help="One more on success, half on overload.")] = False
    count: Annotated[int | None, _load("--count", "-n", help="So many requests.")] = None
    duration: Annotated[float | None, _load(help="For so many seconds.")] = None
    warmup: Annotated[int, _load(help="Requests before, about other pictures.")] = 0
    retries: Annotated[int, _load(min=0, max=100, help="Most times to ask again.")] = 2
    timeout: Annotated[float, _load(help="Seconds for one attempt.")] = 600.0
    seed: Annotated[int, _load(help="Of arrivals and drawn pictures.")] = 0
    insecure: Annotated[bool, _load("--insecure", help="Take any TLS certificate.")] = False
    slo: Annotated[str, _output(help="ttft=500ms,tpot=50ms,e2e=10s: goodput.")] = ""
    min_success: Annotated[float, _output(help="Exit 1 below this share, in %.", min=0, max=100)] = 90.0
    out: Annotated[Path | None, _output("--out", "-o", help="Folder; default: a new one here.")] = None
    resume: Annotated[bool, _output("--resume", help="Go on with the run in --out.")] = False
    html: Annotated[bool, _output(help="Write report.html (needs matplotlib).")] = True
    as_json: Annotated[bool, _output("--json", help="Print the summary as JSON.")] = False
    progress: Annotated[bool | None, _output(help="A bar with live rates; default: on a terminal.")] = None

    def plan(self) -> LoadPlan:
        """Return the load plan."""
        from qvl.backends.openai.retry import RetryPolicy
        from qvl.bench.plan import MOST_IN_FLIGHT, LoadPlan, read_slo

        shared: JsonObject = {field.name: getattr(self, field.name) for field in fields(LoadPlan)}
        usual = MOST_IN_FLIGHT if self.rate else 64 if self.sweep or self.adaptive else 1
        shared |= {"concurrency": self.concurrency or usual, "slo": read_slo(self.slo)}
        return LoadPlan(**shared | {"retries": RetryPolicy(max_retries=self.retries)})

    def endpoints_asked(self) -> Target:
        """Return the endpoints, and the fields of every request."""
        from qvl.bench.run import Target

        params = pairs(self.param or (), "--param")
        if self.max_tokens is not None:
            params["max_tokens"] = self.max_tokens
        if self.url and self.endpoints:
            raise ConfigError("--url and --endpoints together", hint="--url compares; --endpoints spreads one load")
        named = self.url or [url for text in self.endpoints or () for url in text.split(",") if url.strip()]
        return Target(
            urls=tuple(named),
            spread=bool(self.endpoints) and len(named) > 1,
            api=self.target,
            model=self.model,
            api_key=self.api_key,
            headers={name: str(value) for name, value in pairs(self.header or (), "--header").items()},
            params=params,
            stream=self.stream,
            max_pixels=self.max_pixels,
            min_pixels=self.min_pixels,
            verify=not self.insecure,
        )

    def dataset(self) -> Dataset:
        """Return the requests to send.

        Raises:
            ConfigError: not exactly one source of requests is given.
        """
        from qvl.bench.dataset import Drawn, Files, NamedRequest

        if sum(map(bool, (self.data, self.picture, self.synthetic))) != 1:
            raise ConfigError("give one source of requests", hint="--data FILE.jsonl, -f PICTURE, or --synthetic N")
        if self.data:
            err = failure.stderr()
            return Files(
                self.data,
                base_dir=self.base_dir,
                prompt=self.prompt,
                api=self.endpoints_asked().make_api(),
                strict=self.strict,
                on_bad=lambda bad: err.print(f"skipped {bad}", style="yellow"),
            )
        if self.picture:
            return NamedRequest(self.picture, self.prompt)
        width, _, height = self.size.lower().partition("x")
        if not (width.isdigit() and height.isdigit() and 32 <= int(width) <= 8192 and 32 <= int(height) <= 8192):
            raise ConfigError(f"invalid --size {self.size}", hint="as 1024x768, each side from 32 to 8192")
        assert self.synthetic is not None
        return Drawn(self.synthetic, (int(width), int(height)), prompt=self.prompt, first_seed=self.seed * 1_000_000)
