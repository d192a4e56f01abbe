"""What the shell says to a chat template, an adapter, and about films."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripted_endpoint import ScriptedEndpoint


@pytest.mark.parametrize("command", ["ask", "analyze"])
def test_switches_of_a_chat_template_reach_the_model(qvl, picture, command):
    with ScriptedEndpoint() as endpoint:
        options = ("-m", "openai:echo", "--base-url", endpoint.url, "--cache", "off")
        question = ("What?",) if command == "ask" else ()
        said = ("-p", "enable_thinking=false", "-p", 'chat_template_kwargs={"shelf": 3}', "-p", "reasoning_effort=low")
        qvl(command, picture, *question, *options, *said)
        body = next(chat.body for chat in reversed(endpoint.chats) if "image_url" in str(chat.body))
    assert body["chat_template_kwargs"] == {"shelf": 3, "enable_thinking": False}
    assert body["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["enable_thinking=maybe"], "enable_thinking=maybe is neither true nor false"),
        (["chat_template_kwargs=no"], "not a mapping"),
        (["enable_thinking=true", 'chat_template_kwargs={"enable_thinking": true}'], "enable_thinking is given twice"),
        (["reasoning_effort=lots"], "reasoning_effort=lots is unknown"),
        (["enable_thinkin=true"], "unknown parameter 'enable_thinkin'"),
    ],
)
def test_what_a_template_cannot_be_told_is_one_line(qvl, picture, said, words):
    ran = qvl("ask", picture, "What?", *(part for text in said for part in ("-p", text)))
    assert ran.code == 2
    assert words in ran.error


def test_the_help_names_adapters_and_what_is_wrong_with_one_comes_alone(qvl, monkeypatch):
    assert "--lora" in qvl("ask", "--help").out
    monkeypatch.delenv("QVL_MODEL")
    for option in (("--lora", "./nowhere"), ("-O", "adapter=./nowhere")):
        ran = qvl("ask", "What?", *option)
        assert "nowhere" in ran.error
        assert "no model named" not in ran.err
    twice = qvl("ask", "What?", "--lora", "./nowhere", "-O", "adapter=./nowhere")
    assert "--lora and --option adapter" in twice.error
    elsewhere = qvl("ask", "What?", "--lora", "./nowhere", "-m", "openvino:m")
    assert "--lora is for a local model and vllm:NAME, not for openvino:m" in elsewhere.error
    named = qvl("ask", "What?", "--lora", "shelf=./nowhere")
    assert "the only adapter has no name" in named.error
    assert "--lora ./nowhere" in named.error
    monkeypatch.setenv("QVL_MODEL", "openai:m")
    elsewhere = qvl("ask", "What?", "--lora", "./nowhere", "--base-url", "http://127.0.0.1:9")
    assert "an endpoint's adapters are models of it: openai:NAME" in elsewhere.error


def test_a_film_is_no_image_in_the_line_of_time(qvl, folder: Path):
    pytest.importorskip("av", reason="the films of the tests are made with it")
    from tests.media.films import film

    ran = qvl("analyze", str(film(folder / "clip.mp4")))
    assert re.search(r"^video analysis took \d+\.\d\d s \(cache miss\)$", ran.out, re.MULTILINE)
    (head,) = [line for line in ran.out.splitlines() if "confidence" in line and "value" in line]
    assert not re.search(r"confidence +┃ +┃", head), "no column without a name"
