"""The options that `ask`, `analyze`, `agent` and `mcp` share, and the pipeline that they describe."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from qvl.cli import parse_args
from qvl.errors import ConfigError, write_failed

if TYPE_CHECKING:
    from qvl.calibration.abstain import Thresholds
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import JsonObject

_model = partial(typer.Option, rich_help_panel="Model and cache")
_answer = partial(typer.Option, rich_help_panel="How to answer")
_output = partial(typer.Option, rich_help_panel="Output")

Together: TypeAlias = Annotated[bool, _answer("--together", "-t", help="Show all pictures in one request.")]
Iterations: TypeAlias = Annotated[int, _output("--iterations", "-i", min=1, help="Ask N times: a miss, then hits.")]
AsJson: TypeAlias = Annotated[bool, _output("--json", help="One JSON object a line and answer.")]
Verbose: TypeAlias = Annotated[bool, _output("--verbose", "-v", help="Structured logs on stderr.")]
# Of the commands that print no answers.
JsonOnly: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else.")]
CatalogFile: TypeAlias = Annotated[
    Path | None, typer.Option("--catalog", "-c", help="JSON, JSONL or CSV; default: QVL_CATALOG, else a sample.")
]
IndexFile: TypeAlias = Annotated[Path | None, typer.Option("--index", help="Keep the index in this SQLite file.")]


labels_option = partial(typer.Option, rich_help_panel="Labels")
Language: TypeAlias = Annotated[str | None, typer.Option("--language", "-l", help="en, zh, pt or es.")]
SchemaName: TypeAlias = Annotated[
    str | None, typer.Option("--schema", metavar="SCHEMA", help="Your own: bill.json, bills.py:Bill or module:Bill.")
]
QuestionTexts: TypeAlias = Annotated[
    list[str] | None, typer.Option("--question", "-q", help="Yes or no? May be repeated, as the next two.")
]
ChoiceTexts: TypeAlias = Annotated[list[str] | None, typer.Option("--choice", help='"colour: red, blue, green"')]
ScoreTexts: TypeAlias = Annotated[
    list[str] | None, typer.Option("--score", help='"condition: poor, fair, good", low first.')
]
QuestionsFile: TypeAlias = Annotated[
    Path | None, typer.Option("--questions", metavar="FILE", help="More, a JSON list in OpenAI's form.")
]
Concurrency: TypeAlias = Annotated[int | None, _output("--concurrency", "-j", min=1, help="Pictures under way.")]


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """The options of the pipeline and its requests."""

    model: Annotated[str | None, _model("--model", "-m", help="backend:model, hub id or path; default: bundled.")] = (
        None
    )
    device: Annotated[str | None, _model(help="npu, cuda, mps, cpu or auto.")] = None
    base_url: Annotated[list[str] | None, _model(help="Endpoint of openai: models; may be repeated.")] = None
    lora: Annotated[str | None, _model(metavar="PATH", help="A LoRA adapter (PEFT) for all answers.")] = None
    option: Annotated[
        list[str] | None, _model("--option", "-O", metavar="NAME=VALUE", help="Anything else it takes.")
    ] = None
    cache: Annotated[str | None, _model(help="sqlite:///file.db, a path, redis://…, memory:, off.")] = None
    cache_mode: Annotated[str | None, _model(help="auto, always, refresh (ask anew and store) or off.")] = None
    max_pixels: Annotated[int | None, _answer(help="Budget of one picture, in pixels.")] = None
    min_pixels: Annotated[int | None, _answer(help="Smaller pictures are made larger.")] = None
    video: Annotated[
        list[str] | None,
        _answer(metavar="NAME=VALUE", help="Frames of videos: fps=1, nframes=16, video_start=5, video_end=9 …"),
    ] = None
    pages: Annotated[str | None, _answer(metavar="1-3,7", help="Pages of PDFs; all if not named.")] = None
    max_tokens: Annotated[int | None, _answer(help="Longest answer, in tokens.")] = None
    param: Annotated[
        list[str] | None,
        _answer("--param", "-p", metavar="NAME=VALUE", help="temperature=0.2, seed=1, enable_thinking=false …"),
    ] = None
    allowed_private: Annotated[list[str] | None, _answer(metavar="HOST", help="A private host to fetch from.")] = None
    calibration: Annotated[Path | None, _answer(help="What qvl calibrate wrote for this model.")] = None
    abstain: Annotated[
        list[str] | None,
        _answer(metavar="[FIELD=]0.9", help="Tell nothing that is less sure, of all or a field; needs --calibration."),
    ] = None

    def request(self) -> JsonObject:
        """Return the parameters of every request: sampling, extra fields, `cache`.

        Raises:
            ConfigError: an unknown name or an invalid value; raised once, before anything is loaded.
        """
        from qvl.caches.policy import CachePolicy
        from qvl.media.page_choice import read_pages
        from qvl.pipeline.parse_request import request_sampling, sampling_params

        params = parse_args.pairs(self.param or (), "--param")
        if self.max_tokens is not None:
            params["max_tokens"] = self.max_tokens
        template = parse_args.of_template(params)
        sampling_params(params)
        params |= template
        if self.video:
            params["video"] = request_sampling(parse_args.pairs(self.video, "--video"), {})
        if self.pages is not None:
            params["pages"] = read_pages(self.pages, "--pages")
        if self.cache_mode is not None:
            CachePolicy.of(self.cache_mode, deterministic=True)  # type: ignore[arg-type]
            params["cache"] = self.cache_mode
        if self.max_pixels is not None and self.max_pixels < 1024:
            raise ConfigError(f"--max-pixels {self.max_pixels} is too small", hint="at least 1024 (32 x 32)")
        if self.min_pixels is not None and self.min_pixels < 1:
            raise ConfigError(f"--min-pixels {self.min_pixels} is too small", hint="1 or more")
        return params

    def build(self, *, language: str | None = None, concurrency: int | None = None) -> AsyncPipeline:
        """Return the pipeline; nothing is loaded or connected yet.

        Raises:
            ConfigError: an unknown name, or an option that the backend does not have.
        """
        self.request()
        # Importing them is the program's start, and must not count as the first picture's time.
        from qvl import config
        from qvl.media import pixels  # noqa: F401
        from qvl.media.policy import MediaPolicy
        from qvl.pipeline.async_pipeline import AsyncPipeline

        options = parse_args.backend_options(self.option or ())
        if self.device is not None:
            options["device"] = self.device
        if self.base_url:
            options["base_url"] = list(self.base_url)
        if self.lora is not None:
            if "adapter" in options:
                raise ConfigError("--lora and --option adapter=… are the same", hint="give one", param="adapter")
            parse_args.refuse_lora(config.load(model=self.model).model)
            name, equals, path = self.lora.partition("=")
            if equals and not Path(self.lora).exists():
                what = f"--lora {self.lora}: the only adapter has no name, so {name}= is not of its path"
                raise ConfigError(what, hint=f"--lora {path}", param="adapter")
            options["adapter"] = self.lora
        media = None
        if self.allowed_private:
            media = MediaPolicy(allowed_private=tuple(self.allowed_private))
            settings = config.load(max_pixels=self.max_pixels, min_pixels=self.min_pixels)
            media = media.with_sizes(settings.max_pixels, settings.min_pixels)
        return AsyncPipeline(
            self.model,
            cache=self.cache,
            language=language,
            max_pixels=self.max_pixels,
            min_pixels=self.min_pixels,
            media=media,
            concurrency=concurrency,
            calibration=self.calibration,
            abstain=self.thresholds(),
            **options,
        )

    def thresholds(self) -> Thresholds | None:
        """Return the least confidences that `--abstain` names."""
        return read_thresholds(self.abstain or ())


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of a run of `ask` or `analyze` over its pictures."""

    iterations: Iterations = 1
    concurrency: Concurrency = None
    as_json: AsJson = False
    output: Annotated[Path | None, _output("--output", "-o", help="Write JSON lines here too.")] = None
    html: Annotated[Path | None, _output(help="Write a report with thumbnails.")] = None
    verbose: Verbose = False


def read_thresholds(texts: Sequence[str]) -> Thresholds | None:
    """Return `0.9` and `brand=0.95` as Thresholds; None for no text.

    Raises:
        ConfigError: a text that cannot be read, or one name twice.
    """
    from qvl.calibration.abstain import Thresholds

    every: float | None = None
    named: dict[str, float] = {}
    for text in texts:
        # The last one, since a question may have one too.
        name, _, number = text.rpartition("=")
        try:
            least = float(number)
        except ValueError:
            least = -1.0
        if not 0.0 <= least <= 1.0:
            raise ConfigError(f"--abstain {text!r} cannot be read", hint="--abstain 0.9 or --abstain brand=0.95")
        if name in named or (not name and every is not None):
            raise ConfigError(f"--abstain {text!r}: {name or 'all'} is named twice", hint="name each once")
        if name:
            named[name] = least
        else:
            every = least
    return Thresholds(every, named) if texts else None


def check_writable(path: Path, option: str) -> None:
    """Check that a file can be written, before work is done for it.

    Raises:
        ConfigError: it cannot be.
    """
    folder = path.parent
    number = 0
    if path.is_dir():
        number = errno.EISDIR
    elif not folder.is_dir():
        number = errno.ENOTDIR if folder.exists() else errno.ENOENT
    elif not os.access(path if path.exists() else folder, os.W_OK):
        number = errno.EACCES
    if number:
        raise write_failed(f"{option} {path}", OSError(number, os.strerror(number)))


def start_logs(verbose: bool, as_json: bool = False) -> None:
    """Log warnings (with `verbose` all levels) to stderr, as text or (`as_json`) as JSON lines."""
    from qvl import log

    log.configure(level="info" if verbose else "warning", json=verbose and as_json)
