"""A calibration in use beside the server: decisions, LangChain, the agent, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.calibration import Calibration
from qvl.decisions import Choice, Predicate, Score
from qvl.errors import ConfigError
from tests.calibration.made import calibration_for, halved
from tests.evaluation.shelf import Reader

NEW = Predicate("Is it new?", "new")
SURE, UNSURE = Image.new("RGB", (960, 40), "red"), Image.new("RGB", (640, 40), "red")


def pipeline(abstain: object = None, backend: Reader | None = None) -> Pipeline:
    made = calibration_for(Reader().identity(), NEW)
    return Pipeline(backend=backend or Reader(), cache="off", calibration=made, abstain=abstain)  # type: ignore[arg-type]


def test_a_decision_has_its_calibrated_confidence_and_the_raw_one() -> None:
    with pipeline() as pipe:
        new, old = pipe.decide(UNSURE, [NEW, "Is it old?"])
    assert (new.confidence, new.confidence_method) == (pytest.approx(halved(0.64)), "calibrated")
    assert new.raw_confidence == pytest.approx(0.64)
    assert new.probability == pytest.approx(0.64)
    assert (old.confidence, old.confidence_method) == (pytest.approx(0.64), "label_probability")
    assert new.to_json()["raw_confidence"] == pytest.approx(0.64)
    assert "raw_confidence" not in old.to_json()


@pytest.mark.parametrize("abstain", [0.5, {"new": 0.5}])
def test_a_decision_that_is_too_unsure_has_no_value_and_says_why(abstain: object) -> None:
    with pipeline() as pipe:
        unsure, sure = (pipe.decide(picture, NEW, abstain=abstain)[0] for picture in (UNSURE, SURE))  # type: ignore[arg-type]
    assert (unsure.value, unsure.abstained) == (None, "below_threshold")
    assert unsure.to_json()["abstained"] == "below_threshold"
    assert unsure.probabilities is not None
    assert (sure.value, sure.abstained) == (True, None)


def test_a_question_without_a_calibration_is_refused_before_it_is_asked() -> None:
    backend = Reader()
    with pipeline(backend=backend) as pipe:
        with pytest.raises(ConfigError, match="no calibration of the question 'Is it old\\?'"):
            pipe.decide(SURE, "Is it old?", abstain=0.5)
        with pytest.raises(ConfigError, match="no field or question 'old'"):
            pipe.decide(SURE, "Is it old?", abstain={"old": 0.5})
    assert backend.asked == 0


def test_a_calibration_of_other_options_is_of_another_question() -> None:
    two = Choice("Which?", ["red", "blue"])
    made = calibration_for(Reader().identity(), two, Score("How?", ["a", "b"]))
    assert made.question(Choice("Which?", ["blue", "red"]), made.decisions.prompt_version) is not None  # type: ignore[union-attr]
    assert made.question(Choice("Which?", ["blue", "green"]), made.decisions.prompt_version) is None  # type: ignore[union-attr]
    assert made.question(Predicate("How?"), made.decisions.prompt_version) is None  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="another prompt version of decisions"):
        made.question(two, "decide-0")


def test_the_pipelines_abstain_is_of_what_the_calibration_is_of() -> None:
    made = calibration_for(Reader().identity())
    with Pipeline(backend=Reader(), cache="off", calibration=made, abstain=0.8) as pipe:
        assert pipe.decide(UNSURE, NEW)[0].value is True
        assert pipe.analyze(UNSURE).abstained == {"brand": "below_threshold", "category": "below_threshold"}
        assert pipe.analyze(UNSURE, abstain=0.0).abstained == {}


def test_what_a_person_sees_says_that_it_cannot_be_told() -> None:
    with pipeline(abstain={"brand": 0.6}) as pipe:
        answer = pipe.analyze(UNSURE)
    assert answer.rows()[:2] == [("brand", "brand", "cannot tell"), ("category", "category", "mug")]
    assert "cannot tell" in answer._repr_html_()


def test_the_agent_says_what_it_cannot_tell_and_searches_without_it(tmp_path: Path) -> None:
    from qvl.agent import Catalog, Recommender

    shop = tmp_path / "shop.jsonl"
    rows = [{"id": "1", "name": "Mug of TIMORA", "brand": "TIMORA", "category": "mug", "price": "3 EUR"}]
    shop.write_text("\n".join(map(json.dumps, rows)))
    with Catalog(shop) as catalog, pipeline(abstain={"brand": 0.6}) as pipe:
        recommender = Recommender(pipe, catalog, writes=False)
        answer = recommender.recommend(UNSURE)
        recommender.close()
    assert answer.text.startswith("The picture shows mug. I cannot tell the brand. The catalogue has:")
    assert "brand" not in answer.query
    assert answer.analysis["abstained"] == {"brand": "below_threshold"}


def test_an_agent_that_can_tell_nothing_does_not_say_that_there_is_nothing(tmp_path: Path) -> None:
    from qvl.agent.grounding import template

    analysis = {"brand": None, "category": None, "attributes": {}, "abstained": {"brand": "x", "category": "x"}}
    assert template(analysis, []) == "I cannot tell the brand or category, so nothing is recommended."  # type: ignore[arg-type]


def test_a_decision_model_of_langchain_leaves_out_what_is_too_unsure() -> None:
    pytest.importorskip("langchain_core.decisions")
    from langchain_core.decisions import Noul

    from qvl.agent import QvlDecisionModel

    made = calibration_for(Reader().identity(), Predicate("Is it new?"))
    with Pipeline(backend=Reader(), cache="off", calibration=made) as pipe:
        questions = {"new": Noul(instructions="Is it new?")}
        assert "new" in QvlDecisionModel(pipeline=pipe).invoke({"state": "A mug.", "questions": questions}).answers
        careful = QvlDecisionModel(pipeline=pipe, abstain=0.9)
        assert careful.invoke({"state": "A mug.", "questions": questions}).answers == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a calibration: invalid JSON"),
        ("{", "is not a calibration: invalid JSON"),
        ("[]", "cal.json is not a calibration"),
        ('{"format": "qvl-calibration", "version": 7}', "a calibration of version 7, and this qvl reads version 1"),
        ('{"format": "qvl-calibration", "version": 1}', "not a valid calibration: backend: Field required"),
        (
            '{"format": "qvl-calibration", "version": 1, "backend": {}, "analysis": {"prompt_version": "a", '
            '"language": "en", "schema": {}, "raw_method": "x", "fields": {"brand": {"labels": 9, "right": 1, "curve": '
            '{"method": "platt", "slope": NaN, "offset": 1}}}}}',
            "analysis.fields.brand.curve.platt.slope",
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cal.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Pipeline(backend=Reader(), calibration=file)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json cannot be read: No such file"):
        Pipeline(backend=Reader(), calibration=str(tmp_path / "none.json"))


def test_a_calibration_goes_through_its_file_unchanged(tmp_path: Path) -> None:
    made = calibration_for(Reader().identity(), NEW)
    (tmp_path / "cal.json").write_text(made.to_text())
    assert Calibration.load(tmp_path / "cal.json") == made


@pytest.mark.asyncio
async def test_map_abstains_too(tmp_path: Path) -> None:
    made = calibration_for(Reader().identity())
    async with AsyncPipeline(backend=Reader(), cache="off", calibration=made) as pipe:
        items = [item async for item in pipe.map([SURE, UNSURE], abstain={"brand": 0.6})]
    assert [item.value.brand for item in items] == ["NORVIK", None]  # type: ignore[union-attr]
