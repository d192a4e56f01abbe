"""The five hooks of a plugin. Built-in backends and caches register through the same ones.

A plugin is a module (or object) in the entry-point group `qvl`:

```python
import qvl

@qvl.hookimpl
def register_backends(register):
    register("mine", "my_package.backend:MyBackend")
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qvl.types import ChatRequest, Result

hookspec = pluggy.HookspecMarker("qvl")
hookimpl = pluggy.HookimplMarker("qvl")


@hookspec
def register_backends(register: Callable[[str, object], None]) -> None:
    """Call `register(name, factory)`; `factory` is a class, a callable, or "package.module:Class" (imported on use).

    `Pipeline("name:model", **options)` calls `factory(model, **options)`.
    """


@hookspec
def register_caches(register: Callable[[str, object], None]) -> None:
    """Call `register(scheme, factory)`; a cache URL `scheme:…` calls `factory(url)`."""


@hookspec
def register_map_engines(register: Callable[[str, object], None]) -> None:
    """Call `register(name, factory)`; `Pipeline.map(engine=name)` iterates over what `factory` makes.

    It is called with the AsyncPipeline, the sources and the arguments of `map`; see `qvl.pipeline.ray_map`.
    """


@hookspec
def register_routes(app: FastAPI, pipeline: object) -> None:
    """Add routes to the FastAPI application of `qvl-serve`, whose AsyncPipeline is `pipeline`."""


@hookspec
def response_done(request: ChatRequest, result: Result) -> None:
    """Called after every finished answer, cached or not, on the event loop: be quick. Errors are logged, not raised."""
