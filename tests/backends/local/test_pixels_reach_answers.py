"""What the picture shows is what the answer says: through the gate, the processor, the engine and the Pipeline."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.analysis.parse_answer import build_messages
from qvl.analysis.product import ProductAnalysis
from qvl.backends.local.model.model_folder import bundled_folder
from qvl.media.gate import load
from qvl.tiny import render
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart
from tests.backends.local.reference import Reference

HELD_OUT = 9_000_000
MUG = render.DrawnProduct("NORVIK", "mug", "red", 1)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline("local:" + str(bundled_folder()), device="cpu", dtype="float32", cache="off") as pipe:
        yield pipe


def drawn(product: render.DrawnProduct | None = MUG, seed: int = HELD_OUT) -> Image.Image:
    return render.draw(product, seed)


def as_jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_pictures_give_the_answers_of_plain_transformers(count: int) -> None:
    questions = ["What brand is it?", "What colour is it?", "这是什么品牌？", "Describe it."]
    conversations: list[list[Any]] = []
    for number in range(count):
        picture = load(render.sample(HELD_OUT + number)[1])
        if number % 2:
            parts = (ImagePart(picture), TextPart(questions[number // 2 % 4]))
            conversations.append([Message("user", parts)])
        else:
            messages = build_messages([picture], schema=ProductAnalysis, language="en", spell_out_schema=False)
            conversations.append(list(messages))

    async def through_the_pipeline() -> list[str]:
        async with AsyncPipeline(device="cpu", dtype="float32", cache="off") as pipe:
            return [
                result.text
                for result in await asyncio.gather(*(pipe.chat(messages, max_tokens=60) for messages in conversations))
            ]

    reference = Reference(bundled_folder())
    greedy = SamplingParams(max_tokens=60)
    expected = [
        reference.tokenizer.decode(reference.generate(ChatRequest(tuple(messages), greedy)), skip_special_tokens=True)
        for messages in conversations
    ]
    assert asyncio.run(through_the_pipeline()) == expected


def test_a_picture_on_its_side_is_turned_by_its_exif(pipe: Pipeline) -> None:
    upright = drawn()
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    right = pipe.analyze(as_jpeg(upright))
    assert (right.brand, right.category, right.attributes["color"]) == ("NORVIK", "mug", "red")
    with_exif = pipe.analyze(as_jpeg(turned, orientation=6))
    assert (with_exif.brand, with_exif.category) == ("NORVIK", "mug")
    without = pipe.analyze(as_jpeg(turned))
    assert (without.brand, without.category) != ("NORVIK", "mug")


def test_swapped_pictures_swap_the_answer(pipe: Pipeline) -> None:
    red, blue = drawn(), drawn(render.DrawnProduct("NORVIK", "mug", "blue", 1), HELD_OUT + 1)
    question = "What colour is the second?"
    assert pipe.ask([red, blue], question).text.lower().startswith("blue")
    assert pipe.ask([blue, red], question).text.lower().startswith("red")


@pytest.mark.parametrize("color", ["red", "blue", "green", "yellow"])
def test_a_changed_colour_changes_the_answer(pipe: Pipeline, color: str) -> None:
    found = pipe.analyze(drawn(render.DrawnProduct("NORVIK", "mug", color, 1)))
    assert found.attributes["color"] == color


def test_hidden_colour_under_alpha_does_not_reach_the_answer(pipe: Pipeline) -> None:
    white = drawn()
    hidden = Image.new("RGBA", white.size, (0, 0, 0, 0))
    hidden.paste(white.convert("RGBA"), (0, 0))
    alpha = Image.new("L", white.size, 255)
    hidden.putalpha(alpha)
    assert pipe.analyze(hidden).brand == "NORVIK"
    hidden.putalpha(Image.new("L", white.size, 0))
    seen, blank = pipe.analyze(hidden), pipe.analyze(Image.new("RGB", white.size, "white"))
    assert (seen.brand, seen.category, seen.attributes) == (blank.brand, blank.category, blank.attributes)
    assert seen.brand is None


def test_the_answer_streams_as_it_is_folded(pipe: Pipeline) -> None:
    chunks = list(pipe.stream(drawn(), "Describe it."))
    whole = pipe.ask(drawn(), "Describe it.")
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len(chunks) > 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.image_tokens > 0


def test_chinese_in_chinese_out(pipe: Pipeline) -> None:
    found = pipe.analyze(drawn(), language="zh")
    labels = render.labels(MUG, "zh")
    assert (found.brand, found.category) == (labels["brand"], labels["category"])


def test_the_same_weights_from_a_copied_folder_are_the_same_model(pipe: Pipeline, tmp_path: Path) -> None:
    copy = shutil.copytree(bundled_folder(), tmp_path / "copy")
    with Pipeline(str(copy), device="cpu", dtype="float32", cache="off") as other:
        assert other.ask(drawn(), "What brand is it?").text == pipe.ask(drawn(), "What brand is it?").text
