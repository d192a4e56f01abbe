from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.agent import Catalog, Recommender, StepError
from qvl.agent.steps import Event, Recommendation
from qvl.errors import ConfigError
from tests.agent.conftest import NOTHING, RED_MUG, SAMPLE, ShopModel, down, model_of


def steps(found: Recommendation) -> list[str]:
    return [event.step for event in found.events if event.kind == "start" and event.name == event.step]


def test_it_looks_then_searches_then_answers(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe("Take [1]; else [2] is good.")
    found = Recommender(pipeline, catalog, limit=3).recommend(picture, "under 100")
    assert steps(found) == ["analyze", "search", "answer"]
    first, second = (hit.product for hit in found.products[:2])
    names = [f"{item.name} ({item.price_text}, {item.id})" for item in (first, second)]
    assert found.text == f"Take {names[0]}; else {names[1]} is good."
    assert (found.written_by, found.pending, found.failed) == ("model", None, None)
    assert (first.brand, first.category, first.attributes["color"]) == ("NORVIK", "mug", "red")
    assert found.products[0].why[0]


def test_the_wish_narrows_what_the_picture_says(pipe: Any, catalog: Catalog, picture: str) -> None:
    found = Recommender(pipe(), catalog).recommend(picture, "in blue, under 100")
    assert found.products
    for hit in found.products:
        assert (hit.product.category, hit.product.attributes["color"]) == ("mug", "blue")
        assert (hit.product.price or 0) <= 100
    without = Recommender(pipe(), catalog).recommend(picture, "not red")
    assert all(hit.product.attributes["color"] != "red" for hit in without.products)


@pytest.mark.parametrize(
    "invented",
    [
        "Take the Nike Air Max.",
        "[1] is good, but Pegasus is better.",
        "[9] is best.",
        "[1] costs 3.50 only.",
        "Take MU-9999 or [1].",
        "There is nothing.",
        "[1] or the zelpho one.",
        "[1] or 《飞人跑鞋》.",
        'I would choose [1] or "air runner".',
        "[1] for 5€",
        "",
    ],
)
def test_what_is_invented_is_asked_again_and_then_replaced(
    pipe: Any, catalog: Catalog, picture: str, invented: str
) -> None:
    pipeline = pipe(invented)
    found = Recommender(pipeline, catalog).recommend(picture)
    assert found.written_by == "template"
    assert "refused twice" in found.notes[-1]
    assert len(model_of(pipeline).requests) == 2
    assert found.text.startswith("The picture shows NORVIK mug")
    again = Recommender(pipe(invented, "So [1] it is."), catalog).recommend(picture)
    assert again.written_by == "model"
    assert again.text == f"So {again.products[0].product.name} ({again.products[0].product.price_text}, MU-0001) it is."


def test_the_model_is_shown_no_id_and_no_name(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe()
    Recommender(pipeline, catalog).recommend(picture)
    asked = model_of(pipeline).requests[0].messages[-1].text
    assert "MU-0001" not in asked
    assert "Cima" not in asked


def test_follow_ups_reuse_the_analysis_and_what_was_wished(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe()
    recommender = Recommender(pipeline, catalog)
    first = recommender.recommend(picture, "glass or so, under 100", thread="t")
    second = recommender.recommend(None, "cheaper ones?", thread="t")
    assert model_of(pipeline).looked == 1
    assert next(event for event in second.events if event.kind == "end").data["cache"] == "thread"
    best = first.products[0].product.price or 0
    assert all((hit.product.price or 0) < best for hit in second.products)
    third = recommender.recommend(None, "from Haxley", thread="t")
    assert third.query["only"]["brand"] == "HAXLEY"


def test_what_is_not_there_is_said_and_what_comes_near_is_shown(pipe: Any, catalog: Catalog, picture: str) -> None:
    near = Recommender(pipe(), catalog).recommend(picture, "from Haxley, in purple, under 30")
    assert near.products
    assert all((hit.product.price or 0) <= 30 for hit in near.products)
    assert "no product is category mug, brand HAXLEY, color purple at that price; these come near" in near.notes
    none = Recommender(pipe(), catalog).recommend(picture, "from Haxley, over 5000")
    assert (none.products, none.written_by) == ((), "template")
    assert "no product is category mug, brand HAXLEY at that price" in none.notes
    assert "nothing like it" in none.text


def test_a_new_picture_in_a_thread_is_looked_at(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe()
    recommender = Recommender(pipeline, catalog)
    recommender.recommend(picture, "in blue", thread="t")
    found = recommender.recommend(Image.new("RGB", (40, 40), "blue"), thread="t")
    assert model_of(pipeline).looked == 2
    assert "color" not in found.query["only"]


def test_a_picture_of_no_product_recommends_nothing(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe(seen=NOTHING)
    found = Recommender(pipeline, catalog).recommend(picture, "mug")
    assert found.products == ()
    assert "no product" in found.text
    assert model_of(pipeline).requests == []


def test_without_a_writing_model_the_template_says_so(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe()
    found = Recommender(pipeline, catalog, writes=False).recommend(picture)
    assert found.written_by == "template"
    assert "does not write" in found.notes[-1]
    assert "Norvik Cima 500 (10.90 EUR, MU-0001)" in found.text
    assert model_of(pipeline).requests == []


def test_an_endpoint_that_is_down_names_the_step_and_keeps_the_analysis(
    pipe: Any, catalog: Catalog, picture: str
) -> None:
    found = Recommender(pipe(down()), catalog).recommend(picture)
    assert found.failed == "answer"
    assert "nothing listens" in found.notes[-1]
    assert found.analysis["brand"] == "NORVIK"
    assert found.products
    pipeline = pipe(seen=down())
    recommender = Recommender(pipeline, catalog)
    with pytest.raises(StepError, match="analyze failed: nothing listens") as caught:
        recommender.recommend(picture, thread="t")
    assert caught.value.recommendation.failed == "analyze"
    model_of(pipeline).seen = RED_MUG
    assert recommender.resume("t").products


def test_a_second_run_needs_no_inference(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe()
    recommender = Recommender(pipeline, catalog)
    one, two = recommender.recommend(picture, "blue"), recommender.recommend(picture, "blue")
    assert (model_of(pipeline).looked, len(model_of(pipeline).requests)) == (1, 1)
    assert (one.inferences, two.inferences) == (2, 0)
    assert one.text == two.text


def test_stopped_before_a_step_it_resumes_there_also_with_another_wish(
    pipe: Any, catalog: Catalog, picture: str, tmp_path: Path
) -> None:
    recommender = Recommender(pipe(), catalog, checkpoints=tmp_path / "threads.db")
    found = recommender.recommend(picture, "in blue", thread="t", stop_before="search")
    assert (found.pending, found.text, found.analysis["category"]) == ("search", "", "mug")
    recommender.close()
    pipeline = pipe()
    later = Recommender(pipeline, catalog, checkpoints=tmp_path / "threads.db")
    done = later.resume("t", wish="in green")
    assert steps(done) == ["search", "answer"]
    assert done.products[0].product.attributes["color"] == "green"
    assert model_of(pipeline).looked == 0
    with pytest.raises(ConfigError, match="unknown thread"):
        later.resume("nobody")
    later.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from qvl import Pipeline
from qvl.agent import Catalog, Recommender
from tests.agent.conftest import SAMPLE, ShopModel

folder, picture = Path(sys.argv[1]), sys.argv[2]
model = ShopModel(lambda request: os.kill(os.getpid(), signal.SIGKILL))
recommender = Recommender(
    Pipeline(backend=model, cache="off"), Catalog(SAMPLE, index=folder / "i.db"), checkpoints=folder / "threads.db"
)
recommender.recommend(picture, "in blue", thread="t")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the platform has no SIGKILL")
def test_killed_between_nodes_it_goes_on_after_the_last_finished_one(pipe: Any, tmp_path: Path, picture: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), picture],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pipeline = pipe()
    with Catalog(SAMPLE, index=tmp_path / "i.db") as catalog:
        recommender = Recommender(pipeline, catalog, checkpoints=tmp_path / "threads.db")
        found = recommender.resume("t")
        recommender.close()
    assert steps(found) == ["answer"]
    assert model_of(pipeline).looked == 0
    assert found.products[0].product.attributes["color"] == "blue"
    assert found.written_by == "model"


def test_events_come_as_they_happen_in_async_code_too(catalog: Catalog, picture: str) -> None:
    async def main() -> list[Any]:
        async with AsyncPipeline(backend=ShopModel(), cache="off") as pipeline:
            recommender = Recommender(pipeline, catalog)
            return [item async for item in recommender.astream(picture, "blue")]

    *events, last = asyncio.run(main())
    assert isinstance(last, Recommendation)
    assert all(isinstance(event, Event) for event in events)
    assert events == list(last.events)


def test_bad_calls_are_refused(pipe: Any, catalog: Catalog, picture: str, tmp_path: Path) -> None:
    recommender = Recommender(pipe(), catalog)
    with pytest.raises(ConfigError, match="no picture"):
        recommender.recommend()
    with pytest.raises(ConfigError, match="unknown step"):
        recommender.recommend(picture, stop_before="guess")  # type: ignore[arg-type]
    with pytest.raises(StepError, match="analyze failed"):
        recommender.recommend(str(tmp_path / "none.png"))
    with pytest.raises(ConfigError, match="limit"):
        Recommender(pipe(), catalog, limit=0)


def test_pipelines_of_one_process_do_not_meet(catalog: Catalog, picture: str) -> None:
    with Pipeline(backend=ShopModel(), cache="off") as one, Pipeline(backend=ShopModel(), cache="off") as two:
        Recommender(one, catalog).recommend(picture, thread="t")
        with pytest.raises(ConfigError):
            Recommender(two, catalog).recommend(None, "cheaper", thread="t")
