"""A picture in a message is the same picture in whatever form it is written, and of the size that its part asks for."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.errors import ConfigError, RequestError
from qvl.media.gate import load
from qvl.media.picture import Picture
from qvl.types import Message, TextPart

from .conftest import TalkingBackend


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(out, "PNG")
    return out.getvalue()


DATA = png(640, 480)
TEXT = base64.b64encode(DATA).decode()
URL = f"data:image/png;base64,{TEXT}"
FORMS: dict[str, dict[str, Any]] = {
    "Qwen": {"type": "image", "image": URL},
    "Qwen without a type": {"image": URL},
    "Qwen's data: URL": {"type": "image", "image": f"data:image;base64,{TEXT}"},
    "bytes": {"type": "image", "image": DATA},
    "OpenAI": {"type": "image_url", "image_url": {"url": URL}},
    "OpenAI with null": {"type": "image_url", "image_url": {"url": URL, "detail": None}, "cache_control": None},
    "a plain string": {"type": "image_url", "image_url": URL, "detail": "auto"},
    "Responses": {"type": "input_image", "image_url": URL, "file_id": None, "detail": "high"},
    "Qwen with OpenAI's field": {"type": "image", "image_url": URL},
    "Qwen with OpenAI's object": {"type": "image", "image_url": {"url": URL, "detail": "high"}},
    "Responses with Qwen's field": {"type": "input_image", "image": URL},
    "OpenAI with Qwen's field": {"type": "image_url", "image": URL, "image_url": None},
    "OpenAI with base64": {"type": "image_url", "base64": TEXT, "mime_type": "image/png"},
    "OpenAI with Anthropic's source": {
        "type": "image_url",
        "source": {"type": "base64", "media_type": "image/png", "data": TEXT},
    },
    "Anthropic": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": TEXT},
        "cache_control": {"type": "ephemeral"},
    },
    "Anthropic's URL": {"type": "image", "source": {"type": "url", "url": URL}},
    "MCP": {"type": "image", "data": TEXT, "mimeType": "image/png", "annotations": None, "_meta": None},
    "LangChain, older": {"type": "image", "source_type": "base64", "data": TEXT, "mime_type": "image/png"},
    "LangChain, older, a URL": {"type": "image", "source_type": "url", "url": URL},
    "LangChain": {"type": "image", "base64": TEXT, "mime_type": "image/png", "id": "lc_1"},
    "LangChain, a URL": {"type": "image", "url": URL, "extras": {}},
}


def seen(*messages: Any, pipe: dict[str, Any] | None = None, **params: Any) -> tuple[Picture, ...]:
    """The pictures that reach the backend."""
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="off", **(pipe or {})) as pipeline:
        pipeline.chat(list(messages), **params)
    return backend.requests[0].pictures


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def size(part: dict[str, Any], **params: Any) -> tuple[int, int]:
    (picture,) = seen(user(part), **params)
    assert picture.rgb().size == (picture.width, picture.height)
    return picture.width, picture.height


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_is_that_picture(form: str) -> None:
    (picture,) = seen(user({"type": "text", "text": "what?"}, FORMS[form]))
    assert picture == load(DATA)
    assert picture.data == DATA


def test_a_part_is_taken_where_a_picture_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(DATA)
    backend = TalkingBackend(reply=lambda request: '{"brand": "A", "category": "b", "attributes": {}}')
    with Pipeline(backend=backend, cache="off") as pipe:
        pipe.ask([FORMS["MCP"], str(tmp_path / "a.png")], "q")
        pipe.analyze({"type": "image", "image": str(tmp_path / "a.png"), "max_pixels": 65536})
        with pytest.raises(RequestError, match=r"pictures\[0\] is text, not a picture"):
            pipe.analyze({"type": "text", "text": "x"})
    asked, analyzed = backend.requests
    assert asked.pictures == (load(DATA), load(DATA))
    assert (analyzed.pictures[0].width, analyzed.pictures[0].height) == (288, 192)


# By transformers' own smart_resize, with factor 32.
RESIZED = [
    ((640, 480), {"max_pixels": 65536}, (288, 192)),
    ((640, 480), {"min_pixels": 500_000, "max_pixels": 1_000_000}, (832, 640)),
    ((640, 480), {"min_pixels": 500_000}, (832, 640)),
    ((50, 70), {"min_pixels": 50176}, (192, 288)),
    ((333, 777), {"max_pixels": 40_000}, (128, 288)),
    ((640, 480), {"resized_height": 280, "resized_width": 420}, (416, 288)),
    ((640, 480), {"max_pixels": 640 * 480}, (640, 480)),
]


@pytest.mark.parametrize(("given", "limits", "wanted"), RESIZED)
def test_a_part_is_of_the_size_that_smart_resize_gives_it(
    given: tuple[int, int], limits: dict[str, int], wanted: tuple[int, int]
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png(*given)).decode()}"
    image = Image.open(io.BytesIO(png(*given)))
    for part in (
        {"type": "image", "image": url, **limits},
        {"type": "image", "image": image, **limits},
        {"type": "image_url", "image_url": {"url": url}, **limits},
        {"type": "image_url", "image_url": {"url": url, **limits}},
        {"type": "image_url", "image_url": url, **limits},
        {"type": "input_image", "image_url": url, **limits},
        {"type": "image", "source": {"type": "url", "url": url}, **limits},
        {"type": "image", "image": load(png(*given)), **limits},
    ):
        assert size(part) == wanted


@pytest.mark.parametrize("case", [case for case in RESIZED if "resized_height" not in case[1]])
def test_arguments_and_processor_settings_mean_the_same_for_every_picture(case: Any) -> None:
    given, limits, wanted = case
    part = {"type": "image", "image": png(*given)}
    assert size(part, **limits) == wanted
    assert size(part, extra={"mm_processor_kwargs": limits}) == wanted
    names = {"max_pixels": "longest_edge", "min_pixels": "shortest_edge"}
    size_of = {names[name]: value for name, value in limits.items()}
    assert size(part, extra={"mm_processor_kwargs": {"size": size_of}}) == wanted
    backend = TalkingBackend(reply=lambda request: '{"brand": "A", "category": "b", "attributes": {}}')
    with Pipeline(backend=backend, cache="off") as pipe:
        pipe.ask(png(*given), "q", **limits)
        list(pipe.stream(png(*given), "q", **limits))
        pipe.analyze(png(*given), **limits)
    assert {(p.width, p.height) for request in backend.requests for p in request.pictures} == {wanted}


def test_a_message_with_a_loaded_picture_obeys_the_arguments_too() -> None:
    from qvl.types import ImagePart

    (picture,) = seen(Message("user", (TextPart("q"), ImagePart(load(DATA)))), max_pixels=65536)
    assert (picture.width, picture.height) == (288, 192)


def test_a_part_has_the_last_word_and_the_gate_the_limit() -> None:
    part = {"type": "image", "image": URL, "max_pixels": 65536}
    other = {"type": "image", "image": URL}
    one, two = seen(user(part, other), max_pixels=200_000)
    assert [(p.width, p.height) for p in (one, two)] == [(288, 192), (512, 384)]
    assert size({**part, "max_pixels": 10_000_000}, pipe={"max_pixels": 65536}) == (288, 192)
    assert size(other, pipe={"min_pixels": 500_000}) == (832, 640)


def test_a_turned_picture_is_resized_as_it_is_seen() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 480), "red").save(out, "JPEG", exif=exif)
    for image in (out.getvalue(), Image.open(io.BytesIO(out.getvalue()))):
        assert size({"type": "image", "image": image, "max_pixels": 65536}) == (192, 288)
        assert size({"type": "image", "image": image, "resized_height": 320, "resized_width": 64}) == (64, 320)


def test_the_size_of_a_part_is_in_the_key(tmp_path: Path) -> None:
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache=f"sqlite:///{tmp_path / 'a.db'}") as pipe:
        for limits in ({}, {"max_pixels": 65536}, {"min_pixels": 500_000}, {"min_pixels": 4096}):
            states = [pipe.chat([user({"type": "image", "image": URL, **limits})]).cache for _ in range(2)]
            assert states == ["miss", "hit"], limits


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        ({"max_pixels": 3}, "max_pixels", "too small"),
        ({"max_pixels": 0}, "max_pixels", "too small"),
        ({"min_pixels": 0}, "min_pixels", "too small"),
        ({"min_pixels": -1}, "min_pixels", "too small"),
        ({"max_pixels": "65536"}, "max_pixels", "not a whole number"),
        ({"min_pixels": 1e5}, "min_pixels", "not a whole number"),
        ({"max_pixels": True}, "max_pixels", "not a whole number"),
        ({"min_pixels": 90_000, "max_pixels": 80_000}, "min_pixels", "above max_pixels=80000"),
        ({"min_pixels": 10**9}, "min_pixels", "above the limit of 2621440"),
        ({"resized_height": 64}, "resized_height", "needs resized_width"),
        ({"resized_height": 10**6, "resized_width": 10**6}, "resized_height", "above the limit"),
        ({"resized_height": 1, "resized_width": 1000}, "resized_height", "too narrow"),
        ({"resized_height": 64, "resized_width": [64]}, "resized_width", "not a whole number"),
    ],
)
def test_limits_that_cannot_work_are_refused_by_their_part(limits: dict[str, Any], name: str, words: str) -> None:
    for part, place in (
        ({"type": "image", "image": URL, **limits}, "messages[0].content[1]"),
        ({"type": "image_url", "image_url": {"url": URL, **limits}}, "messages[0].content[1].image_url"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            seen(user({"type": "text", "text": "q"}, part))
        assert caught.value.param == f"{place}.{name}"
        assert str(caught.value).startswith(f"{place}.{name}=")
    if "resized_height" not in limits:
        with pytest.raises(ConfigError, match=words) as refused:
            seen(user(FORMS["Qwen"]), **limits)
        assert refused.value.param == name
        with pytest.raises(RequestError, match=words) as caught:
            seen(user(FORMS["Qwen"]), extra={"mm_processor_kwargs": limits})
        assert caught.value.param == f"mm_processor_kwargs.{name}"


WRONG: list[tuple[Any, str, str]] = [
    ({"type": "audio_url", "audio_url": {"url": URL}}, ".type", "audio_url"),
    ({"type": "input_audio", "input_audio": {}}, ".type", "known: text, image_url"),
    ({"type": 7}, ".type", "unknown value '7'"),
    ({}, ".type", "is missing"),
    (None, "", "not null"),
    (3, "", "not a number"),
    ([], "", "not a list"),
    ({"type": "text"}, ".text", "is missing"),
    ({"type": "text", "text": 3}, ".text", "not a number"),
    ({"type": "text", "text": "x", "txet": "y"}, ".txet", "unknown field"),
    ({"type": "refusal"}, ".refusal", "is missing"),
    ({"type": "image_url"}, ".image_url", "is missing"),
    ({"type": "image_url", "image_url": {}}, ".image_url.url", "is missing"),
    ({"type": "image_url", "image_url": {"url": 5}}, ".image_url.url", "not a number"),
    ({"type": "image_url", "image_url": [URL]}, ".image_url", "not a list"),
    ({"type": "image_url", "image_url": {"url": URL, "detail": "medium"}}, ".image_url.detail", "high, original"),
    ({"type": "image_url", "image_url": URL, "detail": ["low"]}, ".detail", "auto, low, high, original"),
    ({"type": "image_url", "image_url": {"url": URL, "size": 1}}, ".image_url.size", "unknown field"),
    ({"type": "input_image", "file_id": "file-1"}, ".file_id", "unknown field"),
    ({"type": "image"}, "", "has no picture"),
    ({"type": "image", "url": URL, "data": TEXT}, "", "by data and by url"),
    ({"type": "image", "image": URL, "image_url": URL}, "", "by image and by image_url"),
    ({"type": "input_image", "image": URL, "source": {"data": TEXT}}, "", "by image and by source"),
    ({"type": "image", "data": 5}, ".data", "not a number"),
    ({"type": "image", "source": {"type": "file", "file_id": "f"}}, ".source.file_id", "unknown field"),
    ({"type": "image", "source": {"type": "file"}}, ".source.type", "base64, url"),
    ({"type": "image", "source_type": "id", "id": "f"}, ".source_type", "base64, url"),
]


@pytest.mark.parametrize(("part", "place", "words"), WRONG)
def test_a_part_that_is_wrong_is_named_with_its_field_and_what_is_known(part: Any, place: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        seen(user({"type": "text", "text": "q"}, part))
    assert caught.value.param == f"messages[0].content[1]{place}"
    assert str(caught.value).startswith(f"messages[0].content[1]{place}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


MISREAD: list[tuple[Any, str, str]] = [
    ("hello", "messages[1]", "not text"),
    ({"content": "x"}, "messages[1].role", "is missing"),
    ({"role": "alien", "content": "x"}, "messages[1].role", "known: system, developer, user, assistant, tool"),
    ({"role": "user"}, "messages[1].content", "is missing"),
    ({"role": "user", "content": 5}, "messages[1].content", "not a number"),
    ({"role": "user", "content": "x", "contents": "y"}, "messages[1].contents", "known: role, content, name"),
    ({"role": "user", "content": "x", "tool_calls": [{"id": "a"}]}, "messages[1].tool_calls", "unknown field"),
    ({"role": "tool", "content": "x"}, "messages[1].tool_call_id", "is missing"),
    ({"role": "assistant", "audio": {"id": "a"}}, "messages[1].audio", "unknown field"),
    ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls", "not an object"),
    ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[1].tool_calls[0].function", "is missing"),
    (
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {}}]},
        "messages[1].tool_calls[0].type",
        "known: function",
    ),
    (
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": 3}}]},
        "messages[1].tool_calls[0].function.arguments",
        "not a number",
    ),
]


@pytest.mark.parametrize(("message", "place", "words"), MISREAD)
def test_a_message_that_is_wrong_is_named_with_its_field(message: Any, place: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        seen(user("q"), message)
    assert caught.value.param == place
    assert str(caught.value).startswith(place)
    assert words in str(caught.value)


def test_what_came_with_an_answer_is_taken_back_with_it() -> None:
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": {"größe": 3}}}
    call["function"] |= {"parsed_arguments": {"größe": 3}}
    earlier = {
        "role": "assistant",
        "content": [{"type": "text", "text": "so", "cache_control": {"type": "ephemeral"}}],
        "tool_calls": [call],
        "parsed": {"a": 1},
        "provider_specific_fields": {"x": 1},
        "reasoning_details": [{"type": "reasoning.text"}],
        "annotations": [],
        "refusal": None,
        "audio": None,
        "function_call": None,
    }
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="off") as pipe:
        pipe.chat([user("q"), earlier, {"role": "tool", "tool_call_id": "c", "content": "5"}, user("and?")])
        pipe.chat([user("q"), {"role": "assistant", "content": None, "refusal": "I will not"}, user("why?")])
        pipe.chat([user("q"), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, user("why?")])
    first, second, third = backend.requests
    assert first.messages[1].text == "so"
    assert first.messages[1].tool_calls[0].arguments == '{"größe": 3}'
    assert [second.messages[1].text, third.messages[1].text] == ["I will not", "no"]
