"""Models that a command names beside `--model`: `MODEL,name=value,…`, its own options behind commas."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qvl.cli.options import PipelineOptions
    from qvl.pipeline.async_pipeline import AsyncPipeline

# A comma that begins an option, not one within a path.
_OWN: Final = re.compile(r",(?=[a-z_]+=)")


def build_target(
    target: str,
    settings: PipelineOptions,
    *,
    language: str | None = None,
    concurrency: int | None = None,
    cache: str | None = None,
) -> AsyncPipeline:
    """Return the pipeline of `target`; what it does not say is as in `settings`, `--base-url` for endpoints alone.

    Raises:
        ConfigError: an unknown name, or an option that the backend does not have.
    """
    model, *own = _OWN.split(target)
    names = {text.partition("=")[0] for text in own}
    remote = model.startswith("openai:")
    mine = replace(
        settings,
        model=model,
        # An adapter is of one model; a target names its own: MODEL,adapter=PATH.
        lora=None,
        base_url=settings.base_url if remote and "base_url" not in names else None,
        device=None if remote or "device" in names else settings.device,
        option=[*(settings.option or ()), *own],
        cache=cache,
    )
    return mine.build(language=language, concurrency=concurrency)
