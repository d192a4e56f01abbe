"""Every form of input, by what arrived at the server."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl.bench.dataset import Files, endless
from qvl.errors import ConfigError
from tests.media.papers import BAG, MUG, paper
from tests.scripted_endpoint import ScriptedEndpoint

ASKED = "What brand?"


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def pictures_of(body: dict[str, Any]) -> list[bytes]:
    """The bytes of the pictures that arrived."""
    contents = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
    urls = [part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def forms(name: str, url: str) -> dict[str, tuple[Any, str, int]]:
    """By name: the line, the text that must arrive, how many pictures must arrive."""
    part = {"type": "image_url", "image_url": {"url": name}}
    asked = {"type": "text", "text": ASKED}
    messages = [{"role": "user", "content": [part, asked]}]
    batch = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions"}
    return {
        "messages": ({"messages": messages}, ASKED, 1),
        "messages with text alone": ({"messages": [{"role": "user", "content": ASKED}]}, ASKED, 0),
        "messages with a data URL": (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, asked]}]},
            ASKED,
            1,
        ),
        "a bare list": (messages, ASKED, 1),
        "prompt": ({"prompt": ASKED}, ASKED, 0),
        "text": ({"text": ASKED}, ASKED, 0),
        "image_url": ({"image_url": url}, "Describe it.", 1),
        "image_url as an object": ({"image_url": {"url": url}}, "Describe it.", 1),
        "image_path": ({"image_path": name}, "Describe it.", 1),
        "text and image_path": ({"text": ASKED, "image_path": name}, ASKED, 1),
        "image_path and text": ({"image_path": name, "text": ASKED}, ASKED, 1),
        "prompt and image_url": ({"prompt": ASKED, "image_url": url}, ASKED, 1),
        "vLLM's image_files": ({"prompt": ASKED, "image_files": [name, name]}, ASKED, 2),
        "vLLM's content": ({"content": [part, asked]}, ASKED, 1),
        "OpenAI's batch": ({**batch, "body": {"model": "other", "messages": messages}}, ASKED, 1),
        "Qwen's image parts": (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": name}, {"text": ASKED}]}]},
            ASKED,
            1,
        ),
        "messages with images beside them": (
            {"messages": [{"role": "user", "content": f"<image>{ASKED}"}], "images": [name]},
            ASKED,
            1,
        ),
        "messages with unmarked images": (
            {"messages": [{"role": "user", "content": ASKED}], "images": [name]},
            ASKED,
            1,
        ),
    }


@pytest.mark.parametrize("form", forms("", ""))
def test_what_stands_in_a_line_arrives_at_the_server(form: str, endpoint, measure, lines, picture: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    line, text, pictures = forms(picture.name, url)[form]

    summary = measure(lines(line), endpoint)

    (received,) = endpoint.chats
    assert "".join(text_of(message["content"]) for message in received.body["messages"]) == text
    assert pictures_of(received.body) == [picture.read_bytes()] * pictures
    assert received.body["model"] == "echo"
    found = summary.data["endpoints"][0]
    assert found["pictures"]["requests"] == (pictures > 0)
    assert (found["pictures"]["image_tokens"] > 0) == (pictures > 0)


def test_params_of_a_batch_line_arrive_but_not_its_model_or_stream(endpoint, measure, lines) -> None:
    body = {
        "model": "gpt",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "max_tokens": 3,
        "seed": 7,
    }
    measure(lines({"custom_id": "x", "url": "/v1/chat/completions", "body": body}), endpoint)

    sent = endpoint.chats[0].body
    assert (sent["max_tokens"], sent["seed"], sent["stream"], sent["model"]) == (3, 7, True, "echo")
    assert sent["stream_options"] == {"include_usage": True}


def test_relative_pictures_start_at_the_folder_of_their_file_or_at_base_dir(endpoint, bench, tmp_path: Path) -> None:
    for name, colour in (("here", "red"), ("there", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "p.png")
    data = tmp_path / "here" / "data.jsonl"
    data.write_text('{"image_path": "p.png", "text": "x"}\n')

    bench("--url", endpoint.url, "-d", data, "--out", tmp_path / "a", "--no-html")
    bench("--url", endpoint.url, "-d", data, "--out", tmp_path / "b", "--no-html", "--base-dir", tmp_path / "there")

    arrived = [pictures_of(received.body)[0] for received in endpoint.chats]
    assert arrived == [(tmp_path / name / "p.png").read_bytes() for name in ("here", "there")]


def test_one_picture_of_the_command_line_arrives(endpoint, bench, picture: Path, tmp_path: Path) -> None:
    ran = bench("--url", endpoint.url, "-f", picture, "--prompt", ASKED, "--out", tmp_path / "o", "--no-html")

    assert ran.exit_code == 0, ran.output
    assert pictures_of(endpoint.chats[0].body) == [picture.read_bytes()]


def test_drawn_pictures_have_the_wanted_size_and_differ(endpoint, bench, tmp_path: Path) -> None:
    from io import BytesIO

    bench("--url", endpoint.url, "--synthetic", 4, "--size", "160x96", "--out", tmp_path / "o", "--no-html")

    arrived = [pictures_of(received.body)[0] for received in endpoint.chats]
    assert len(set(arrived)) == 4
    for data in arrived:
        with Image.open(BytesIO(data)) as image:
            assert image.size == (160, 96)


def test_globs_read_every_file_in_order(endpoint, measure, lines, tmp_path: Path) -> None:
    lines({"prompt": "one"}, name="a.jsonl")
    lines({"prompt": "two"}, {"prompt": "three"}, name="b.jsonl")

    measure(tmp_path / "*.jsonl", endpoint)

    assert [received.body["messages"][0]["content"] for received in endpoint.chats] == ["one", "two", "three"]


BAD = ['{"prompt": "cut', "17", '{"category": "shoe"}', '{"messages": []}', '{"prompt": 3}', '{"image_path": 5}', "[1]"]


def test_bad_lines_are_listed_with_file_and_line_and_skipped(endpoint, bench, lines, tmp_path: Path) -> None:
    data = lines({"prompt": "good"}, *BAD, {"prompt": "good too"})

    ran = bench("--url", endpoint.url, "-d", data, "--out", tmp_path / "o", "--no-html")

    assert ran.exit_code == 0
    for number in range(2, 2 + len(BAD)):
        assert f"{data}:{number}: " in ran.stderr
    assert len(endpoint.chats) == 2
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["bad_lines"]["count"] == len(BAD)


def test_strict_stops_at_the_first_bad_line(endpoint, bench, lines, tmp_path: Path) -> None:
    ran = bench("--url", endpoint.url, "-d", lines(BAD[0]), "--strict", "--out", tmp_path / "o")

    assert ran.exit_code == 2
    assert "data.jsonl:1" in ran.stderr
    assert endpoint.chats == []


@pytest.mark.parametrize("name", ["missing.png", "", "broken.png"])
def test_a_picture_that_cannot_be_read_is_a_failed_item_and_nothing_is_sent(
    name: str, endpoint, measure, lines, records, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")

    summary = measure(lines({"text": "What is it?", "image_path": name}, {"text": "fine"}), endpoint)

    assert [received.body["messages"][0]["content"] for received in endpoint.chats] == ["fine"]
    failed = records()[0]
    assert (failed.success, failed.error_kind) == (False, "picture")
    assert summary.data["endpoints"][0]["requests"] == {"sent": 2, "ok": 1, "failed": 1, "success_rate": 0.5}
    assert summary.data["endpoints"][0]["throughput"]["requests_per_second"] is not None


def test_a_server_that_counts_no_picture_tokens_is_warned_about_loudly(measure, lines, picture: Path) -> None:
    with ScriptedEndpoint(ignores=["image_url"]) as blind:
        summary = measure(lines({"text": "What?", "image_path": picture.name}), blind)

    assert any(text.startswith("NO PICTURE TOKENS") for text in summary.data["warnings"])


def test_items_without_end_have_ids_of_their_own(lines) -> None:
    items = endless(Files([str(lines({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}))]))

    assert [(item.index, item.id) for item, _ in zip(items, range(5), strict=False)] == [
        (0, "x"), (1, "y"), (2, "x#2"), (3, "y#2"), (4, "x#3"),
    ]  # fmt: skip


def test_an_input_that_matches_nothing_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        Files([str(tmp_path / "*.jsonl")])


@pytest.mark.parametrize(("name", "count"), [("bill.pdf", 2), ("bill.pdf#page=2", 1)])
def test_a_document_arrives_as_its_pages(endpoint, measure, lines, tmp_path: Path, name: str, count: int) -> None:
    (tmp_path / "bill.pdf").write_bytes(paper([MUG, BAG]))
    summary = measure(lines({"images": [name], "prompt": "What?"}), endpoint)
    (received,) = endpoint.chats
    assert len(pictures_of(received.body)) == count
    assert "Page 2:" in text_of(received.body["messages"][0]["content"])
    assert summary.data["endpoints"][0]["pictures"]["image_tokens"] > 0
