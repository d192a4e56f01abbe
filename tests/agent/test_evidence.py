"""The agent's page shows where on the picture its brand and product are seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from qvl import Pipeline
from qvl.agent import Catalog, Recommender
from qvl.agent.page import page
from qvl.agent.trace import Trace
from tests.agent.conftest import RED_MUG, SAMPLE, ShopModel

PICTURE = str(Path(SAMPLE).parents[1] / "pictures" / "norvik-mug-red.png")
SEEN = {**RED_MUG, "evidence": {"brand": [30, 30, 960, 240], "category": None, "attributes": [250, 380, 840, 900]}}


def test_the_page_draws_what_the_analysis_saw() -> None:
    with Pipeline(backend=ShopModel(seen=SEEN, model="Qwen3-VL"), cache="off") as pipe, Catalog(SAMPLE) as shop:
        recommender = Recommender(pipe, shop, writes=False, evidence=True)
        answer = recommender.recommend(PICTURE, "a mug")
        assert set(answer.evidence) == {"brand", "attributes"}
        assert answer.evidence["brand"]["box"]["x1"] == 15.36
        json.dumps(answer.to_json())
        drawn = page(Trace("a mug", PICTURE), answer, PICTURE)
        assert "<svg" in drawn
        assert ">brand</text>" in drawn
        plain = dataclasses.replace(answer, evidence={})
        assert "<svg" not in page(Trace("a mug", PICTURE), plain, PICTURE)
        assert "evidence" not in plain.to_json()
        # A conversation about the same picture keeps it.
        again = recommender.recommend(None, "cheaper", thread=answer.thread)
        assert again.evidence == answer.evidence
        recommender.close()
