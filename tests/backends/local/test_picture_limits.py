"""The limits of a picture part decide what the bundled model itself sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.backends.local.text.processor import ImageRules
from qvl.media.gate import load
from qvl.media.policy import MediaPolicy
from qvl.media.smart_resize import PixelLimits

PICTURE = Image.new("RGB", (96, 128), "red")


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline(cache="off", device="cpu") as opened:
        yield opened


def image_tokens(pipe: Pipeline, role: str = "user", **limits: Any) -> int:
    part = {"type": "image", "image": PICTURE, **limits}
    messages: list[Any] = [{"role": role, "content": [part, {"type": "text", "text": "q"}]}]
    if role != "user":
        messages.append({"role": "user", "content": "q"})
    return pipe.chat(messages, max_tokens=1).usage.image_tokens


def test_a_part_sets_the_number_of_its_tokens(pipe: Pipeline) -> None:
    assert image_tokens(pipe) == 3 * 4
    assert image_tokens(pipe, max_pixels=4096) == 2
    assert image_tokens(pipe, resized_height=64, resized_width=96) == 2 * 3
    # Less than the checkpoint's own lower limit of twelve.
    assert image_tokens(pipe, image=Image.new("RGB", (32, 64))) >= 12
    assert image_tokens(pipe, image=Image.new("RGB", (32, 64)), min_pixels=2048) == 2


def test_a_system_message_may_hold_a_picture_where_the_template_shows_it(pipe: Pipeline) -> None:
    assert image_tokens(pipe, role="system") == 3 * 4


@pytest.mark.parametrize(
    ("size", "limits", "wanted"),
    [
        # As transformers' image processor does with its own lower limit of 65,536 pixels.
        ((64, 64), {}, (256, 256)),
        ((64, 64), {"max_pixels": 100_000}, (256, 256)),
        ((64, 64), {"min_pixels": 4096}, (64, 64)),
        ((640, 480), {"max_pixels": 16384}, (128, 96)),
        ((640, 480), {"resized_width": 96, "resized_height": 64}, (96, 64)),
    ],
)
def test_a_size_that_a_request_set_is_not_made_larger_by_the_checkpoint(
    size: tuple[int, int], limits: dict[str, int], wanted: tuple[int, int]
) -> None:
    picture = load(Image.new("RGB", size), MediaPolicy(limits=PixelLimits(**limits)))
    rows, columns = ImageRules().resized(picture.height, picture.width, sized=picture.sized)
    assert (columns, rows) == wanted
