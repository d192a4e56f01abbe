"""The options that `ask` and `analyze` share, and the pipeline that they describe."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from qvl.cli import parse_args
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline

_MODEL: Final = "Model and cache"
_OUTPUT: Final = "Output"
_ANSWER: Final = "How to answer"

Model: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", "-m", help="backend:model, hub id or path; default: bundled.", rich_help_panel=_MODEL),
]
CacheUrl: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache", help="sqlite:///file.db, a path, redis://…, memory:, off.", rich_help_panel=_MODEL),
]
CacheModeName: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache-mode", help="auto, always, refresh (ask anew and store) or off.", rich_help_panel=_MODEL),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option("--device", help="npu, cuda, mps, cpu or auto.", rich_help_panel=_MODEL)
]
BaseUrl: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--base-url", help="Endpoint of openai: models; may be repeated.", rich_help_panel=_MODEL),
]
BackendOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="NAME=VALUE", help="Anything else it takes.", rich_help_panel=_MODEL),
]
MaxPixels: TypeAlias = Annotated[
    int | None, typer.Option("--max-pixels", help="Budget of one picture, in pixels.", rich_help_panel=_ANSWER)
]
MinPixels: TypeAlias = Annotated[
    int | None, typer.Option("--min-pixels", help="Smaller pictures are made larger.", rich_help_panel=_ANSWER)
]
MaxTokens: TypeAlias = Annotated[
    int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.", rich_help_panel=_ANSWER)
]
Param: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="temperature=0.2, seed=1 …", rich_help_panel=_ANSWER),
]
Together: TypeAlias = Annotated[
    bool, typer.Option("--together", "-t", help="Show all pictures in one request.", rich_help_panel=_ANSWER)
]
AllowPrivate: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--allowed-private", metavar="HOST", help="A private host to fetch from.", rich_help_panel=_ANSWER),
]
Iterations: TypeAlias = Annotated[
    int, typer.Option("--iterations", "-i", min=1, help="Ask N times: a miss, then hits.", rich_help_panel=_OUTPUT)
]
Jobs: TypeAlias = Annotated[
    int | None, typer.Option("--concurrency", "-j", min=1, help="Pictures under way.", rich_help_panel=_OUTPUT)
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="One JSON object a line and answer.", rich_help_panel=_OUTPUT)
]
OutputFile: TypeAlias = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write JSON lines here too.", rich_help_panel=_OUTPUT)
]
HtmlFile: TypeAlias = Annotated[
    Path | None, typer.Option("--html", help="Write a report with thumbnails.", rich_help_panel=_OUTPUT)
]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="Structured logs on stderr.", rich_help_panel=_OUTPUT)
]


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What the command line says about the pipeline."""

    model: str | None = None
    cache: str | None = None
    cache_mode: str | None = None
    language: str | None = None
    device: str | None = None
    base_url: Sequence[str] = ()
    options: Sequence[str] = ()
    max_pixels: int | None = None
    min_pixels: int | None = None
    max_tokens: int | None = None
    params: Sequence[str] = ()
    allow_private: Sequence[str] = ()
    concurrency: int | None = None
    given: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        from qvl.caches.policy import CachePolicy
        from qvl.pipeline.parse_request import sampling_params

        given = parse_args.pairs(self.params, "--param")
        if self.max_tokens is not None:
            given["max_tokens"] = self.max_tokens
        # A name or value that cannot work is said once, before anything is loaded, not once for every picture.
        sampling_params(given)
        if self.cache_mode is not None:
            CachePolicy.of(self.cache_mode, deterministic=True)  # type: ignore[arg-type]
        if self.max_pixels is not None and self.max_pixels < 1024:
            raise ConfigError(f"--max-pixels {self.max_pixels} is too small", hint="at least 1024 (32 x 32)")
        if self.min_pixels is not None and self.min_pixels < 1:
            raise ConfigError(f"--min-pixels {self.min_pixels} is too small", hint="1 or more")
        object.__setattr__(self, "given", given)

    def request(self) -> dict[str, Any]:
        """What goes with every request."""
        return {**self.given, **({"cache": self.cache_mode} if self.cache_mode is not None else {})}

    def build(self) -> AsyncPipeline:
        """The pipeline; nothing is loaded or connected yet.

        Raises:
            ConfigError: an unknown name, or an option that the backend does not take.
        """
        # Importing them is the program's start, and must not count as the first picture's time.
        from qvl import config
        from qvl.media import pixels  # noqa: F401
        from qvl.media.policy import MediaPolicy
        from qvl.pipeline.async_pipeline import AsyncPipeline

        options = parse_args.pairs(self.options, "--option")
        for name in inspect.signature(AsyncPipeline).parameters:
            if name in options:
                raise ConfigError(
                    f"--option {name} is the pipeline's, not the backend's", hint="see qvl analyze --help"
                )
        if self.device is not None:
            options["device"] = self.device
        if self.base_url:
            options["base_url"] = list(self.base_url)
        media = None
        if self.allow_private:
            media = MediaPolicy(allowed_private=tuple(self.allow_private))
            settings = config.load(max_pixels=self.max_pixels, min_pixels=self.min_pixels)
            media = media.with_sizes(settings.max_pixels, settings.min_pixels)
        return AsyncPipeline(
            self.model,
            cache=self.cache,
            language=self.language,
            max_pixels=self.max_pixels,
            min_pixels=self.min_pixels,
            media=media,
            concurrency=self.concurrency,
            **options,
        )


def start_logs(verbose: bool, as_json: bool = False) -> None:
    """Warnings, or with `verbose` everything, on stderr: for people, or as JSON lines beside `--json`."""
    from qvl import log

    log.configure(level="info" if verbose else "warning", json=verbose and as_json)
