"""A box that a model names on what it was shown lies within a pixel of the same place on the original.

The pictures go the whole way: through the media gate with its budget, to an endpoint that decodes the bytes it got and
finds the rectangle on them, or into the local engine, where it is found on the very pixels that the model reads.
"""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl import Box, Pipeline, Point
from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.family import ModelFamily
from qvl.media.smart_resize import smart_resize
from qvl.types import ChatRequest, ResponseFormat
from tests.evidence.drawn import Edges, drawn, seen
from tests.scripted_endpoint import ScriptedEndpoint, ScriptedExchange, Text

ASPECTS = ((640, 480), (300, 900), (1601, 233), (97, 131), (1200, 1201))
BUDGETS = (None, 40_000, 150_000)
MODELS = {"Qwen3-VL-8B": "0-1000", "Qwen/Qwen2.5-VL-7B-Instruct": "pixels"}


@dataclass(slots=True)
class Looker:
    """Answers with the place of the rectangle on the picture that came, in the convention of its model."""

    answers: list[str] = field(default_factory=list)

    async def __call__(self, exchange: ScriptedExchange) -> None:
        body: Any = exchange.received.body
        url = next(part for part in body["messages"][-1]["content"] if part["type"] == "image_url")["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            came = image.convert("RGB")
        if MODELS[body["model"]] == "pixels":
            rows, columns = smart_resize(came.height, came.width, 28, 56 * 56, 28 * 28 * 16384)
            edges = seen(np.asarray(came.resize((columns, rows), Image.Resampling.BICUBIC)))
        else:
            edges = _thousandths(seen(np.asarray(came)), came.width, came.height)
        self.answers.append(json.dumps([{"bbox_2d": [round(edge, 3) for edge in edges], "label": "it"}]))
        await Text(self.answers[-1])(exchange)


def _thousandths(edges: Edges, width: int, height: int) -> Edges:
    x1, y1, x2, y2 = edges
    return x1 * 1000 / width, y1 * 1000 / height, x2 * 1000 / width, y2 * 1000 / height


def _edges(size: tuple[int, int], chance: random.Random) -> tuple[int, int, int, int]:
    width, height = size
    x1, y1 = chance.randrange(width // 2), chance.randrange(height // 2)
    return x1, y1, chance.randrange(x1 + width // 4, width), chance.randrange(y1 + height // 4, height)


def _off(box: Box, edges: tuple[int, int, int, int]) -> float:
    return max(abs(a - b) for a, b in zip((box.x1, box.y1, box.x2, box.y2), edges, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_a_box_from_an_endpoint_is_a_pixel_off_at_most(model: str) -> None:
    chance = random.Random(5)
    with ScriptedEndpoint() as endpoint:
        looker = Looker()
        with Pipeline(f"openai:{model}", base_url=endpoint.url, probe=False, cache="off") as pipe:
            for orientation in range(1, 9):
                for size in ASPECTS:
                    edges, budget = _edges(size, chance), chance.choice(BUDGETS)
                    data = drawn(size, edges, orientation, chance.choice(("JPEG", "PNG")))
                    endpoint.say(looker)
                    (found,) = pipe.locate(data, "it", max_pixels=budget)
                    assert found.box is not None
                    assert (found.box.width, found.box.height) == size
                    assert _off(found.box, edges) <= 1, (
                        orientation,
                        size,
                        budget,
                        edges,
                        found.box,
                        looker.answers[-1],
                    )


class LookingBackend(LocalBackend):
    """The local engine, held by a grammar to the place of the rectangle on the pixels that the model reads."""

    def _engine_request(self, loaded: Any, request: ChatRequest, *rest: Any) -> Any:
        made = loaded.maker.processor.prepare(request)
        (picture,) = made.pictures
        height, width, _ = picture.pixels.shape
        edges = seen(picture.pixels)
        if self.coordinates.convention == "0-1000":
            edges = _thousandths(edges, width, height)
        answer = json.dumps([{"bbox_2d": [round(edge, 2) for edge in edges], "label": "it"}])
        forced = ResponseFormat("choice", choices=(answer,))
        return super()._engine_request(loaded, request.replace(response_format=forced), *rest)


class PixelFamily(ModelFamily):
    """A family that writes pixels of the resized picture, as Qwen2.5-VL."""

    convention = "pixels"


@pytest.mark.parametrize("family", [ModelFamily, PixelFamily])
def test_a_box_from_the_local_engine_is_a_pixel_off_at_most(
    family: type[ModelFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvl.backends.local.model.family.FAMILIES", (family(),))
    chance = random.Random(6)
    with Pipeline(backend=LookingBackend(vision_cache_bytes=0), cache="off") as pipe:
        for orientation, size in zip((3, 6, 8), ASPECTS[1:4], strict=True):
            edges = _edges(size, chance)
            (found,) = pipe.locate(drawn(size, edges, orientation, "PNG"), "it", max_pixels=chance.choice(BUDGETS))
            assert found.box is not None
            assert _off(found.box, edges) <= 1, (orientation, size, edges, found.box)
            # A grammar with one word for an answer leaves no choice, so the model is sure.
            assert found.confidence == pytest.approx(1)


def test_a_box_on_a_tile_is_one_on_the_whole_picture() -> None:
    tile = Box(100, 200, 500, 400, 1000, 800, picture=2)
    # The tile was enlarged to twice its size before it was shown.
    assert Box(200, 100, 400, 200, 800, 400).in_crop(tile) == Box(200, 250, 300, 300, 1000, 800, picture=2)
    assert Point(0, 400, 800, 400).in_crop(tile) == Point(100, 400, 1000, 800, picture=2)
