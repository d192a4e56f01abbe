"""`locate`: an answer is read in all its forms, nothing is passed on in silence, and bad input is one line."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import qvl
from qvl import AsyncPipeline, Box, Located, Pipeline, Point
from qvl.errors import AnalysisError, ConfigError, QvlError, UnsupportedInputError
from qvl.testing.asking import square
from tests.scripted_endpoint import ScriptedEndpoint, Text

WHERE = Box(16, 8, 32, 24, 64, 64)
"""What [250, 125, 500, 375] is on a square of 64 pixels."""


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def pipe(endpoint: ScriptedEndpoint) -> Iterator[Pipeline]:
    with Pipeline("openai:Qwen3-VL-8B", base_url=endpoint.url, probe=False, cache="memory:") as pipeline:
        yield pipeline


ANSWERS = {
    "as asked": '[{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}]',
    "bbox": '[{"bbox": [250, 125, 500, 375], "label": "the brand"}]',
    "one object": '{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}',
    "swapped corners": '[{"bbox_2d": [500, 375, 250, 125], "label": "the brand"}]',
    "strings": '[{"bbox_2d": "250, 125, 500, 375", "label": "the brand"}]',
    "strings inside": '[{"bbox_2d": ["250", "125", "500", "375"], "label": "the brand"}]',
    "fence and text": 'Here it is:\n```json\n[{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}]\n```\nDone.',
    "a thought": '<think>[{"bbox_2d": [1, 2, 3, 4]}]</think>[{"bbox_2d": [250, 125, 500, 375]}]',
    "a JSON string": json.dumps('[{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}]'),
    "wrapped": '{"objects": [{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}]}',
    "by name": '{"the brand": [250, 125, 500, 375]}',
    "bare": "[250, 125, 500, 375]",
    "bare, in a list": "[[250, 125, 500, 375]]",
    "corner by corner": '[{"bbox_2d": [[250, 125], [500, 375]], "label": "the brand"}]',
    "corners by name": '{"x1": 250, "y1": 125, "x2": 500, "y2": 375}',
    "box with names": '[{"box": {"xmin": 250, "ymin": 125, "xmax": 500, "ymax": 375}}]',
    "malformed": "[{'bbox_2d': [250, 125, 500, 375], 'label': 'the brand',}]",
    "line by line": '{"bbox_2d": [250, 125, 500, 375]}\n',
    "pairs": "the brand: (250,125),(500,375)",
    "corner by corner, bare": "[[250, 125], [500, 375]]",
    "numbers alone": "250, 125, 500, 375",
    "numbers in tags": "<box>250 125 500 375</box>",
    "markers": "<|object_ref_start|>the brand<|object_ref_end|><|box_start|>(250,125),(500,375)<|box_end|>",
    "another label": '[{"bbox_2d": [250, 125, 500, 375], "label": "logo"}]',
}


@pytest.mark.parametrize("form", ANSWERS)
def test_every_form_of_an_answer_is_read(form: str, endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text(ANSWERS[form]))
    found = pipe.locate(square(), "the brand", cache="off")
    assert found == [Located("the brand", WHERE, confidence=None)]
    assert WHERE.relative == (0.25, 0.125, 0.5, 0.375)


def test_several_targets_are_one_request_and_come_in_their_order(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    items = [
        {"bbox_2d": [0, 0, 500, 500], "label": "Label"},
        {"bbox_2d": [0, 0, 250, 250], "label": "the cap"},
        {"bbox_2d": [0, 500, 250, 750], "label": "the cap"},
        {"bbox_2d": [0, 500, 250, 750], "label": "a dog"},
    ]
    endpoint.say(Text(json.dumps(items)))
    before = len(endpoint.chats)
    found = pipe.locate(square(), ["the cap", "the label", "the lid"])
    assert [(item.label, item.box and item.box.pixels) for item in found] == [
        ("the cap", (0, 0, 16, 16)),
        ("the cap", (0, 32, 16, 48)),
        ("the label", (0, 0, 32, 32)),
    ]
    assert found.result.notes == ("left out a box labelled 'a dog': that was not asked for",)
    asked = endpoint.chats[before:]
    assert len(asked) == 1
    text = asked[0].body["messages"][0]["content"][-1]["text"]
    assert text.startswith("Locate every instance of: the cap; the label; the lid. Answer with a JSON list of")
    again = pipe.locate(square(), ["the cap", "the label", "the lid"])
    assert again == found
    assert (found.result.cache, again.result.cache) == ("miss", "hit")
    assert again.result.notes == found.result.notes
    assert len(endpoint.chats) == before + 1


TWO = {
    "by name": '{"the cap": [0, 0, 500, 500], "label": [0, 500, 250, 750]}',
    "by name, each an object": '{"the cap": {"bbox_2d": [0, 0, 500, 500]}, "label": {"bbox_2d": [0, 500, 250, 750]}}',
    "a list behind each name": "The label of the cap: label: [0, 500, 250, 750]\n- the cap: [0, 0, 500, 500]",
    "a name behind each list": "[0, 500, 250, 750]: Label\n[0, 0, 500, 500]: the cap",
    "a sentence": "[0, 500, 250, 750] is the label of the cap, and [0, 0, 500, 500] is the cap with its label.",
    "a name behind each pair": "(0,500),(250,750) label, (0,0),(500,500) the cap",
    "markers": (
        "<|object_ref_start|>label<|object_ref_end|><|box_start|>(0,500),(250,750)<|box_end|>"
        "<|object_ref_start|>The cap<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>"
    ),
}


@pytest.mark.parametrize("form", TWO)
def test_labels_stand_in_the_answer_or_beside_each_place(form: str, endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text(TWO[form]))
    found = pipe.locate(square(), ["the cap", "label"], cache="off")
    assert [(item.label, item.box and item.box.pixels) for item in found] == [
        ("the cap", (0, 0, 32, 32)),
        ("label", (0, 32, 16, 48)),
    ]
    assert found.result.notes == ()


def test_a_place_that_names_no_target_is_left_out_and_told(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text("Two of them: [0, 0, 500, 500], and in the landscape [0, 500, 250, 750]"))
    found = pipe.locate(square(), ["cap", "label"], cache="off")
    assert found == []
    assert found.result.notes[0] == ("left out [0, 0, 500, 500]: it has no label, and several targets were asked for")


def test_points_are_asked_for_and_cached_apart(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text('[{"point_2d": [500, 250], "label": "the brand"}]'), Text('[{"bbox_2d": [0, 0, 500, 500]}]'))
    found = pipe.locate(square(), "the brand", points=True)
    assert found == [Located("the brand", point=Point(32, 16, 64, 64))]
    assert "point_2d" in endpoint.chats[-1].body["messages"][0]["content"][-1]["text"]
    (other,) = pipe.locate(square(), "the brand")
    assert other.box is not None


def test_what_is_beyond_the_picture_is_cut_or_left_out_and_told(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    boxes = [[-10, 500, 1500, 750], [1200, 0, 1400, 100], [5, 5, 5, 9], [1, 2, 3], [1, "a", 2, 3], ["NaN", 1, 2, 3]]
    endpoint.say(Text(json.dumps([{"bbox_2d": box} for box in boxes])[:-1] + ', {"bbox_2d": [NaN, 1, 2, 3]}]'))
    found = pipe.locate(square(), "it", cache="off")
    assert found == [Located("it", Box(0, 32, 64, 48, 64, 64, clipped=True))]
    assert found.result.notes == (
        "cut at the picture's edges: [-10, 500, 1500, 750] for 'it'",
        "left out [1200, 0, 1400, 100] for 'it': it is outside of the picture",
        "left out [5, 5, 5, 9] for 'it': it has no area",
        "left out [1, 2, 3] for 'it': a box needs 4 numbers",
        "left out [1, 'a', 2, 3] for 'it': a box needs 4 numbers",
        "left out ['NaN', 1, 2, 3] for 'it': a box needs 4 numbers",
        "left out [nan, 1, 2, 3] for 'it': not a number",
    )


def test_repetitions_are_one_and_fractions_are_read_as_such(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text(json.dumps([{"bbox_2d": [250, 125, 500, 375]}] * 40 + [{"bbox_2d": [0.5, 0.5, 1, 1]}])))
    found = pipe.locate(square(), "it", cache="off")
    assert found == [Located("it", WHERE), Located("it", Box(32, 32, 64, 64, 64, 64))]
    assert found.result.notes == (
        "left out repetitions of [250, 125, 500, 375] for 'it'",
        "read as fractions of the picture: [0.5, 0.5, 1, 1] for 'it'",
    )
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    "text", ["[]", "```json\n[]\n```", '{"answer": []}', '{"the brand": []}', '[{"bbox_2d": null, "label": "it"}]']
)
def test_none_is_an_answer(text: str, endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text(text))
    assert pipe.locate(square(), "the brand", cache="off") == []


@pytest.mark.parametrize("text", ["I see no brand.", '{"brand": "NORVIK"}', "", "3", "1, 2, 3"])
def test_an_answer_without_boxes_is_an_error_with_its_text(
    text: str, endpoint: ScriptedEndpoint, pipe: Pipeline
) -> None:
    endpoint.say(Text(text))
    with pytest.raises(AnalysisError, match="no list of boxes") as caught:
        pipe.locate(square(), "the brand", cache="off")
    assert caught.value.raw == text


def test_the_convention_is_that_of_the_model_or_named(endpoint: ScriptedEndpoint) -> None:
    asked = {}
    for model, options in (
        ("Qwen2.5-VL-3B", {}),
        ("Qwen3-VL-2B", {}),
        ("shop", {}),
        ("shop", {"box_convention": "pixels"}),
    ):
        endpoint.say(Text('[{"bbox_2d": [28, 28, 56, 56]}]'))
        with Pipeline(f"openai:{model}", base_url=endpoint.url, probe=False, cache="off", **options) as pipe:
            found = pipe.locate(square(), "it")
        text = endpoint.chats[-1].body["messages"][0]["content"][-1]["text"]
        asked[model, *options.values()] = ("pixels" in text, found[0].box and found[0].box.x2, found.result.notes)
    # 64 pixels are resized to 56, two tokens of 28.
    assert asked["Qwen2.5-VL-3B",] == (True, 64.0, ())
    assert asked["Qwen3-VL-2B",] == (False, 3.58, ())
    assert asked["shop", "pixels"] == (True, 64.0, ())
    assert asked["shop",][:2] == (False, 3.58)
    assert "'shop'" in asked["shop",][2][0]
    assert "box_convention" in asked["shop",][2][0]
    with pytest.raises(ConfigError, match=r"unknown box convention 'feet' \(0-1000, .* or pixels"):
        Pipeline("openai:shop", base_url=endpoint.url, box_convention="feet")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("", r"targets\[0\] is empty"),
        ([], "no target is named"),
        (["cap", " cap "], r"targets\[1\] 'cap' is named twice"),
        (["cap", "Cap"], "named twice"),
        ("cap; label", "has a semicolon"),
        ("a\x00b", "control character"),
        ("a" * 201, "201 characters"),
        (["a", 3], r"targets\[1\] is a int"),
        (7, "the targets are a int"),
        ([str(number) for number in range(101)], "too many targets"),
    ],
)
def test_targets_that_cannot_be_asked_are_refused_in_one_line(targets: object, message: str, pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pipe.locate(square(), targets)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_backend_without_pictures_refuses_by_name(endpoint: ScriptedEndpoint) -> None:
    from qvl.testing.recording import EchoBackend

    class Blind(EchoBackend):
        @property
        def capabilities(self) -> qvl.Capabilities:
            return qvl.Capabilities(images=0)

    with Pipeline(backend=Blind(), cache="off") as pipe, pytest.raises(UnsupportedInputError, match="support pictures"):
        pipe.locate(square(), "it", points=True)
    with Pipeline(backend=EchoBackend(), cache="off") as pipe, pytest.raises(ConfigError, match="one picture"):
        pipe.locate([square(), square()], "it")  # type: ignore[arg-type]
    with Pipeline(backend=EchoBackend(), cache="off") as pipe, pytest.raises(ConfigError, match="no parameter 'tools'"):
        pipe.locate(square(), "it", tools=[])  # type: ignore[call-arg]


def test_the_bundled_model_answers_in_form_with_confidences() -> None:
    async def ask() -> qvl.Locations:
        async with AsyncPipeline(cache="off") as pipe:
            return await pipe.locate(
                "examples/pictures/norvik-mug-red.png", ["the brand", "the product"], max_tokens=120
            )

    found = asyncio.run(ask())
    assert {item.label for item in found} <= {"the brand", "the product"}
    assert all(item.confidence is not None and 0 < item.confidence <= 1 for item in found)
    answer = found.result.text
    assert answer == "[]" or answer.startswith('[{"bbox_2d"')


def test_map_locates_on_each_picture(endpoint: ScriptedEndpoint, pipe: Pipeline) -> None:
    endpoint.say(Text('[{"bbox_2d": [250, 125, 500, 375]}]'), Text("[]"))
    items = list(pipe.map([square(), square(edge=90), "lost.png"], locate="it", concurrency=1))
    assert [item.value for item in items] == [[Located("it", WHERE)], [], None]
    assert items[0].value is not None
    assert items[0].value.result.pictures == ()
    assert items[2].error is not None
    with pytest.raises(ConfigError, match="one of question, schema and locate"):
        next(pipe.map([square()], "What?", locate="it"))  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="evidence is of analyses"):
        pipe.map([square()], "What?", evidence=True)


def test_shapes_check_themselves() -> None:
    for values, message in (
        ((0, 0, 70, 10, 64, 64), "x2=70 of a box is outside of the picture of 64 x 64"),
        ((float("nan"), 0, 7, 10, 64, 64), "x1=nan of a box is not a number"),
        ((9, 0, 7, 10, 64, 64), "has no area"),
        ((0, 0, 7, 10, 0, 64), "width=0 of a box is out of range"),
    ):
        with pytest.raises(ConfigError, match=message):
            Box(*values)
    with pytest.raises(ConfigError, match="exactly one of box and point"):
        Located("it")
    assert Box(0, 0, 10, 10, 64, 64).iou(Box(5, 0, 15, 10, 64, 64)) == pytest.approx(1 / 3)
    assert Box(0, 0, 10, 10, 64, 64).iou(Box(0, 0, 10, 10, 64, 64, picture=1)) == 0


def test_shapes_are_fields_of_a_pydantic_class() -> None:
    class Part(BaseModel):
        where: Box
        at: Point | None = None

    part = Part(where=WHERE, at=WHERE.center)
    assert Part.model_validate_json(part.model_dump_json()) == part
    assert part.model_dump()["where"]["relative"] == [0.25, 0.125, 0.5, 0.375]
    with pytest.raises(ValidationError, match="not a box within the picture"):
        Part.model_validate({"where": [1, 2, 3, 4]})
    assert Part.model_json_schema()["properties"]["where"]["format"] == "box"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "a NoneType is not a picture"),
        (3, "a int is not a picture"),
        ({"type": "image"}, "picture: has no picture"),
        ({"type": "imag"}, "picture.type: unknown value 'imag'"),
        ({"type": "text", "text": "x"}, "the picture is a text"),
    ],
)
def test_what_is_no_picture_is_told_by_the_argument(pipe: Pipeline, given: Any, words: str) -> None:
    with pytest.raises(QvlError, match=re.escape(words)):
        pipe.locate(given, "the brand")
