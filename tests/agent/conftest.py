from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.agent import Catalog
from qvl.backends.base import Backend, Capabilities
from qvl.errors import BackendUnavailableError
from qvl.types import ChatRequest, Chunk, SamplingParams, ToolCallDelta, Usage

SAMPLE = Path(__file__).parents[2] / "examples" / "catalog" / "products.jsonl"
RED_MUG = {"brand": "NORVIK", "category": "mug", "attributes": {"color": "red", "count": "1"}}
NOTHING = {"brand": None, "category": None, "attributes": {}}


class ShopModel(Backend):
    """Sees `seen` on every picture; for the rest it says its `script`, one answer after the other, the last for ever.

    An answer is a text, an exception to raise, or a list of tool calls as (name, arguments), with texts among them.
    """

    name = "shop"

    def __init__(self, *script: Any, seen: Any = RED_MUG, model: str = "clerk") -> None:
        self.model = model
        self.seen = seen
        self.script = list(script) or ["[1] fits."]
        self.looked = 0
        self.requests: list[ChatRequest] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=8,
            sampling=SamplingParams.names() - {"logprobs"},
            response_formats=frozenset({"json_object", "json_schema"}),
            tools=True,
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        if request.pictures and request.response_format.kind == "json_schema":
            self.looked += 1
            said = self.seen if isinstance(self.seen, Exception) else json.dumps(self.seen)
        else:
            self.requests.append(request)
            said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            said = said(request) if callable(said) else said
        if isinstance(said, Exception):
            raise said
        if isinstance(said, list):
            for text in (item for item in said if isinstance(item, str)):
                yield Chunk(text=text)
            for number, (name, arguments) in enumerate(item for item in said if not isinstance(item, str)):
                text = arguments if isinstance(arguments, str) else json.dumps(arguments)
                yield Chunk(tool_calls=(ToolCallDelta(number, f"call_{len(self.requests)}_{number}", name, text),))
            yield Chunk(finish_reason="tool_calls", usage=Usage(20, 5))
            return
        for word in said.split(" "):
            yield Chunk(text=word if word == said.split(" ")[0] else f" {word}")
        yield Chunk(finish_reason="stop", usage=Usage(20, 5))


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    with Catalog(SAMPLE, index=tmp_path_factory.mktemp("index") / "shop.db") as found:
        yield found


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "mug.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return str(path)


@pytest.fixture
def pipe() -> Iterator[Callable[..., Pipeline]]:
    """Makes pipelines over a ShopModel."""
    made: list[Pipeline] = []

    def make(*script: Any, **options: Any) -> Pipeline:
        made.append(Pipeline(backend=ShopModel(*script, **options), cache="memory:"))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def model_of(pipeline: Any) -> ShopModel:
    found = getattr(pipeline, "pipeline", pipeline).backend
    assert isinstance(found, ShopModel)
    return found


def down() -> BackendUnavailableError:
    return BackendUnavailableError("nothing listens", hint="start it")
