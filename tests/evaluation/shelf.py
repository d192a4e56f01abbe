"""A shelf: pictures whose width is the confidence that a model of ours has in its answer, and their labels."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from qvl.backends.base import Backend, Capabilities
from qvl.types import ChatRequest, Chunk, JsonObject, SamplingParams, TokenLogprob, Usage

TALL = 40
PLACE = "[250, 100, 500, 900]"


@dataclass
class Reader(Backend):
    """Answers NORVIK with the confidence of the picture's width in thousandths, and a mug with one a little higher."""

    name = "reader"
    model: str = "reader-1"
    dtype: str = "float32"
    answer: Callable[[float], JsonObject] = lambda sure: {"brand": "NORVIK", "category": "mug", "attributes": {}}
    asked: int = 0
    logprobs: bool = True
    requests: list[ChatRequest] = field(default_factory=list)

    @property
    def capabilities(self) -> Capabilities:
        known = SamplingParams.names() if self.logprobs else SamplingParams.names() - {"logprobs"}
        return Capabilities(images=8, sampling=known, response_formats=frozenset({"json_schema"}), top_logprobs=20)

    def identity(self) -> JsonObject:
        return {"backend": self.name, "model": self.model, "revision": None, "dtype": self.dtype}

    def peek_identity(self) -> JsonObject | None:
        return self.identity()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.asked += 1
        self.requests.append(request)
        await asyncio.sleep(0)
        sure = request.pictures[0].width / 1000 if request.pictures else 0.64
        if request.response_format.kind == "text":
            yield Chunk(text="yes", logprobs=(self._first(sure),))
        else:
            for piece in _pieces(json.dumps(self.answer(sure)), sure):
                yield Chunk(text=piece.token, logprobs=(piece,) if self.logprobs else ())
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=5))

    def _first(self, sure: float) -> TokenLogprob:
        top = (TokenLogprob("yes", math.log(sure)), TokenLogprob("no", math.log(1 - sure)))
        return TokenLogprob("yes", math.log(sure), top=top)


def _pieces(text: str, sure: float) -> list[TokenLogprob]:
    """The answer as tokens: a value of letters has the confidence, a box its third power, all else is certain."""
    pieces, rest = [], text
    for value, share in (('"NORVIK"', sure), ('"mug"', math.sqrt(sure)), ("12.5", sure), (PLACE, sure**3)):
        before, found, rest_after = rest.partition(value)
        if found:
            pieces += [(before, 1.0), (value, share)]
            rest = rest_after
    pieces.append((rest, 1.0))
    return [TokenLogprob(piece, math.log(share), piece.encode()) for piece, share in pieces if piece]


def write_shelf(folder: Path, count: int, seed: int = 0, power: float = 3.0, **more: object) -> Path:
    """Write `count` pictures with labels: the brand is right with the probability confidence ** power."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(seed)
    with (folder / "labels.jsonl").open("w") as lines:
        for number in range(count):
            width = int(dice.integers(300, 1000))
            Image.new("RGB", (width, TALL), (number % 256, seed % 256, number // 256)).save(folder / f"{number}.png")
            right = dice.random() < (width / 1000) ** power
            label = {"brand": "norvik" if right else "TIMORA", "category": "mug", "attributes": {}, **more}
            lines.write(json.dumps({"image": f"{number}.png", "expected": label}) + "\n")
    return folder / "labels.jsonl"
