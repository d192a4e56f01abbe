"""`judge`: the model is asked of each hit whether it fits the wish, and its answers give the order."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qvl import Pipeline
from qvl.agent import Catalog, Recommender
from qvl.agent.steps import Recommendation
from qvl.backends.base import Capabilities
from qvl.errors import RefusalError
from qvl.types import ChatRequest, Chunk, SamplingParams, TokenLogprob, Usage
from tests.agent.conftest import SAMPLE, ShopModel, down, model_of


class Judge(ShopModel):
    """Says of a product yes with what `fits` gives for its question, or raises that."""

    def __init__(self, fits: Any, *script: Any) -> None:
        super().__init__(*script)
        self.fits = fits
        self.judged: list[ChatRequest] = []

    @property
    def capabilities(self) -> Capabilities:
        have = super().capabilities
        return Capabilities(
            images=have.images,
            sampling=SamplingParams.names() - {"logprob_token_ids"},
            response_formats=have.response_formats,
            top_logprobs=5,
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        if "Does this product fit the wish?" not in request.messages[-1].text:
            async for chunk in super().stream(request):
                yield chunk
            return
        self.judged.append(request)
        fit = self.fits(request.messages[-1].text)
        if isinstance(fit, Exception):
            raise fit
        top = [TokenLogprob(word, math.log(share)) for word, share in (("yes", fit), ("no", 1 - fit)) if share > 0]
        yield Chunk(text="yes", logprobs=(TokenLogprob("yes", top[0].logprob, top=tuple(top)),))
        yield Chunk(finish_reason="stop", usage=Usage(7, 1))


def by_price(text: str) -> float:
    """The dearer, the better."""
    return float(text.rsplit("; ", 1)[1].split(" ")[0]) / 1000


@pytest.fixture
def judged() -> Iterator[Any]:
    made: list[Pipeline] = []

    def make(fits: Any, *script: Any) -> Pipeline:
        made.append(Pipeline(backend=Judge(fits, *script), cache="memory:"))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def _ids(found: Recommendation) -> list[str]:
    return [hit.product.id for hit in found.products]


def test_hits_are_ordered_by_how_probably_they_fit(judged: Any, catalog: Catalog, picture: str) -> None:
    pipeline = judged(by_price, "Take [1].")
    plain = Recommender(pipeline, catalog, limit=4).recommend(picture, "under 100")
    found = Recommender(pipeline, catalog, limit=4, judge=True).recommend(picture, "under 100")
    assert sorted(_ids(found)) == sorted(_ids(plain))
    prices = [hit.product.price for hit in found.products]
    assert prices == sorted(prices, reverse=True) != [hit.product.price for hit in plain.products]
    assert [hit.fit for hit in found.products] == pytest.approx([price / 1000 for price in prices])
    first = found.products[0].product
    # The words are the catalogue's still, and the first is what the answer's first is.
    assert found.text == f"Take {first.name} ({first.price_text}, {first.id})."
    model = model_of(pipeline)
    assert isinstance(model, Judge)
    assert all(len(request.pictures) == 1 for request in model.judged)
    assert all("The customer says: under 100" in request.messages[-1].text for request in model.judged)
    events = [event for event in found.events if event.name == "judge"]
    assert [event.kind for event in events] == ["start", "end"]
    assert events[1].data["fits"][0] == f"{first.id} {first.price / 1000:.0%}"
    assert json.loads(json.dumps(found.to_json()))["products"][0]["fit"] == pytest.approx(first.price / 1000)
    assert f"fits the wish {first.price / 1000:.0%}" in found.rows()[0]["why"]


def test_a_known_judgement_is_not_asked_for_again(judged: Any, catalog: Catalog, picture: str) -> None:
    pipeline = judged(by_price)
    recommender = Recommender(pipeline, catalog, limit=3, judge=True)
    first = recommender.recommend(picture, "under 100")
    asked = len(model_of(pipeline).judged)  # type: ignore[attr-defined]
    again = recommender.recommend(None, "under 100", thread=first.thread)
    assert _ids(again) == _ids(first)
    assert len(model_of(pipeline).judged) == asked  # type: ignore[attr-defined]
    assert [event.data["cache"] for event in again.events if event.name == "judge" and event.kind == "end"] == ["hit"]


def test_what_the_model_will_not_judge_stands_last(judged: Any, catalog: Catalog, picture: str) -> None:
    pipeline = judged(by_price)
    plain = Recommender(pipeline, catalog, limit=3).recommend(picture)
    shunned = plain.products[0].product.name
    pipeline = judged(lambda text: RefusalError("no") if shunned in text else 0.5)
    found = Recommender(pipeline, catalog, limit=3, judge=True).recommend(picture)
    assert [hit.fit for hit in found.products] == [0.5, 0.5, None]
    assert _ids(found) == [*_ids(plain)[1:], _ids(plain)[0]]


def test_a_model_without_logprobs_judges_by_its_word(pipe: Any, catalog: Catalog, picture: str) -> None:
    last = Recommender(pipe(), catalog, limit=3).recommend(picture).products[-1].product.name

    def say(request: ChatRequest) -> str:
        text = request.messages[-1].text
        return "[1] fits." if "fit the wish" not in text else "Yes." if last in text else "no"

    found = Recommender(pipe(say), catalog, limit=3, judge=True).recommend(picture)
    assert [hit.fit for hit in found.products] == [1.0, 0.0, 0.0]
    assert found.products[0].product.name == last


def test_a_judge_that_fails_costs_the_order_alone(judged: Any, catalog: Catalog, picture: str) -> None:
    pipeline = judged(lambda text: down())
    plain = Recommender(pipeline, catalog, limit=3).recommend(picture)
    found = Recommender(pipeline, catalog, limit=3, judge=True).recommend(picture)
    assert (_ids(found), found.failed) == (_ids(plain), None)
    assert any("judge failed: nothing listens" in note for note in found.notes)
    assert [event.kind for event in found.events if event.name == "judge"] == ["start", "error"]


def test_the_command_judges(tmp_path: Path) -> None:
    from qvl.cli import app

    line = ["agent", "-f", str(SAMPLE.parents[1] / "pictures" / "norvik-mug-red.png"), "--catalog", str(SAMPLE)]
    done = CliRunner().invoke(app, [*line, "--index", str(tmp_path / "i.db"), "--judge", "--json", "-n", "2"])
    assert done.exit_code == 0, done.output
    told = [json.loads(row) for row in done.stdout.splitlines()]
    products = told[-1]["recommendation"]["products"]
    assert [0 < product["fit"] < 1 for product in products] == [True, True]
    assert products[0]["fit"] >= products[1]["fit"]
    assert any("has learnt no such questions" in note for note in told[-1]["recommendation"]["notes"])
