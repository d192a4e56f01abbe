"""A run asks the API that `--target` names: requests in its form, streams and token counts as it tells them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.bench.apis import APIS, NoRequestError, find_api
from qvl.bench.dataset import Files
from qvl.errors import ConfigError
from tests.bench.test_load import prompts
from tests.scripted_endpoint import ScriptedEndpoint, ScriptedExchange

STREAMED = ("chat", "responses", "completions", "messages")
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ASKED = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]},
]


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The bundled model behind the real server, without a cache, so that each answer is streamed as it is made."""
    pytest.importorskip("torch")
    from qvl.backends.local.backend import LocalBackend
    from tests.server.conftest import start

    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache="off", wait=False)
    deadline = time.monotonic() + 120
    while running.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, "the model was never ready"
        time.sleep(0.05)
    yield running.url
    running.stop()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_every_target_measures_the_same_answers_of_a_real_server(
    served: str, bench, lines, records, tmp_path: Path, stream: bool
) -> None:
    """The APIs differ in their events alone: text and tokens of one question are the same through each."""
    told, data = {}, lines(*({"prompt": f"Name the colours of {n} mugs.", "max_tokens": 9} for n in range(3)))
    for target in STREAMED:
        ran = bench(
            *("--url", served, "--target", target, "-d", data, "--out", tmp_path / target, "--no-html"),
            *("--stream" if stream else "--no-stream", "-p", "temperature=0"),
        )
        assert ran.exit_code == 0, ran.output
        assert f"· {target} ·" in ran.stdout
        assert all((record.ttft is not None) == stream for record in records(target))
        if stream:
            for record in records(target):
                assert 0 < record.ttft < record.latency
                # One event a token and one more, for the bytes that an end of the text held back, at most.
                assert 1 <= len(record.itl) <= record.completion_tokens
                assert record.tpot is not None
        told[target] = [
            (record.response, record.prompt_tokens, record.completion_tokens, record.counted)
            for record in sorted(records(target), key=lambda record: record.index)
        ]
    assert told["chat"][0][2:] == (9, True)
    assert all(answers == told["chat"] for answers in told.values())


@pytest.mark.slow
def test_pictures_go_to_every_target_that_has_a_form_for_them(served: str, bench, records, tmp_path: Path) -> None:
    told = {}
    for target in ("chat", "responses", "messages"):
        ran = bench(
            "--url", served, "--target", target, "--synthetic", 2, "--max-tokens", 8, "--out", tmp_path / target
        )
        assert ran.exit_code == 0, ran.output
        assert "NO PICTURE TOKENS" not in ran.output
        page = (tmp_path / target / "report.html").read_text()
        assert f"{target}: /v1{APIS[target].path}" in page
        told[target] = [(record.response, record.prompt_tokens, record.pictures) for record in records(target)]
    assert told["chat"] == told["responses"] == told["messages"]
    assert "whose tokens messages does not count apart" in ran.stdout
    ran = bench(
        "--url", served, "--target", "decisions", "--synthetic", 2, "--prompt", "Is it red?", "--out", tmp_path / "d"
    )
    assert ran.exit_code == 0, ran.output
    assert "TTFT  " not in ran.stdout
    for record in records("d"):
        (answer,) = json.loads(record.response)
        assert 0 <= answer["probability"] <= 1
        assert record.prompt_tokens > 16
        assert record.ttft is None


@pytest.mark.slow
def test_lines_may_be_whole_requests_of_the_target(served: str, bench, lines, records, tmp_path: Path) -> None:
    question = {"type": "choice", "instructions": "Which?", "choices": [{"value": "red"}, {"value": "blue"}]}
    whole = {"input": "A red mug.", "questions": [question]}
    data = lines(
        {"custom_id": "a", "method": "POST", "url": "/v1/decisions", "body": whole},
        {"id": "b", **whole},
        {"id": "c", "prompt": "A red mug.", "questions": ["Is it red?", question]},
        {"id": "d", "prompt": "A red mug."},
        {"custom_id": "e", "url": "/v1/chat/completions", "body": {"messages": ASKED}},
    )
    ran = bench("--url", served, "--target", "decisions", "-d", data, "--out", tmp_path / "run", "--no-html")
    assert ran.exit_code == 0, ran.output
    answers = {record.id: json.loads(record.response) for record in records()}
    assert [len(answers[name]) for name in "abc"] == [1, 1, 2]
    assert answers["a"][0]["probabilities"][0]["value"] == answers["b"][0]["probabilities"][0]["value"] == "red"
    assert "data.jsonl:4: --target decisions needs `questions`" in ran.output
    assert "the line is for /v1/chat/completions; --target decisions loads /v1/decisions" in ran.output


def body(target: str, messages: list[dict[str, Any]] = ASKED, **params: Any) -> dict[str, Any]:
    return find_api(target)().body(messages, params)


def test_a_line_is_written_in_the_form_of_the_target() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

    asked = body("responses", max_tokens=7, response_format=schema, tools=[tool], reasoning_effort="low")
    assert asked["input"][0]["content"] == [{"type": "input_text", "text": "Be short."}]
    assert asked["input"][1]["content"][0] == {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    assert (asked["max_output_tokens"], asked["stream"], asked["store"]) == (7, True, False)
    assert asked["text"] == {
        "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    }
    assert asked["tools"] == [{"type": "function", **tool["function"]}]
    assert asked["reasoning"] == {"effort": "low"}

    asked = body("messages", stop="x", tools=[tool], tool_choice="required", response_format=schema)
    assert asked["system"] == [{"type": "text", "text": "Be short."}]
    assert asked["messages"][0]["content"][0]["source"] == {
        "type": "base64", "media_type": "image/png", "data": "AAAA",
    }  # fmt: skip
    assert (asked["max_tokens"], asked["stop_sequences"], asked["tool_choice"]) == (1024, ["x"], {"type": "any"})
    assert asked["output_config"]["format"] == {"type": "json_schema", "schema": {"type": "object"}}

    asked = body("completions", [{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3)
    assert asked == {
        "prompt": "Hi", "logprobs": 3, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    asked = body("decisions", ASKED[1:])
    assert asked["questions"] == [{"type": "predicate", "instructions": "What is it?"}]
    assert [part["type"] for part in asked["input"][0]["content"]] == ["input_image"]


@pytest.mark.parametrize(
    ("target", "messages", "reason"),
    [
        ("completions", ASKED[1:], "a picture, for which --target completions has no form"),
        ("completions", ASKED, "a conversation of 2 messages"),
        ("responses", [{"role": "tool", "tool_call_id": "1", "content": "x"}], "a turn of a tool"),
        ("messages", [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}], "a part 'video_url'"),
        ("decisions", [{"role": "user", "content": "Is it red?"}], "needs `questions`"),
    ],
)
def test_what_a_target_has_no_form_for_is_refused_by_name(target: str, messages: Any, reason: str, lines) -> None:
    with pytest.raises(NoRequestError, match=reason):
        body(target, messages)
    skipped: list[Any] = []
    assert list(Files([str(lines({"messages": messages}))], api=find_api(target)(), on_bad=skipped.append)) == []
    assert reason in str(skipped[0])
    with pytest.raises(ConfigError, match="did you mean 'completions'"):
        find_api("completion")


def test_pictures_of_the_command_line_are_refused_before_anything_is_asked(endpoint, bench, tmp_path: Path) -> None:
    ran = bench("--url", endpoint.url, "--target", "completions", "--synthetic", 2, "--out", tmp_path / "o")
    assert ran.exit_code == 2
    assert ran.stderr.strip().endswith("(choose another --target, or another input)")
    assert (endpoint.requests, (tmp_path / "o").exists()) == ([], False)


@pytest.mark.parametrize(("target", "route"), [("responses", "/chat/completions"), ("chat", "/responses")])
def test_an_endpoint_without_the_route_is_refused_in_one_line(
    bench, lines, tmp_path: Path, target: str, route: str
) -> None:
    with ScriptedEndpoint(route=route) as endpoint:
        ran = bench("--url", endpoint.url, "--target", target, "-d", lines(*prompts(2)), "--out", tmp_path / "o")
    assert ran.exit_code == 1
    refusal = f"{endpoint.url} has no {APIS[target].path} (choose another --target, or another endpoint)"
    assert refusal in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_field_that_a_target_has_not_is_refused_by_name(endpoint, bench, lines, tmp_path: Path) -> None:
    data, out = lines({"prompt": "Is it red?", "questions": "Is it?", "max_tokens": 4}, *prompts(1)), tmp_path / "o"
    ran = bench("--url", endpoint.url, "--target", "decisions", "-d", data, "--max-tokens", 9, "--out", out)
    assert ran.exit_code == 2
    assert ran.stderr.strip().endswith(
        "max_tokens, for which --target decisions has no form (leave it out, or choose another --target)"
    )
    assert (endpoint.requests, out.exists()) == ([], False)
    with pytest.raises(NoRequestError, match="tools, for which --target completions has no form"):
        body("completions", [{"role": "user", "content": "Hi"}], tools=[{}])
    with pytest.raises(ConfigError, match="max_tokens, for which --target decisions has no form"):
        list(Files([str(data)], api=find_api("decisions")(), strict=True))


def test_a_run_is_resumed_with_the_target_that_it_had(endpoint, bench, lines, tmp_path: Path) -> None:
    words = ("--url", endpoint.url, "-d", lines(*prompts(2)), "--out", tmp_path / "o", "--no-html")
    assert bench(*words).exit_code == 0
    folder = tmp_path / "o" / "run.json"
    run = json.loads(folder.read_text())
    del run["asked"]["target"]  # as a run from before there was a choice
    folder.write_text(json.dumps(run))
    assert bench(*words, "--resume").exit_code == 0
    run["asked"]["target"] = "messages"
    folder.write_text(json.dumps(run))
    assert "started with another target" in bench(*words, "--resume").stderr


def test_a_stream_that_fails_midway_is_an_error_of_its_own_kind(bench, lines, records, tmp_path: Path) -> None:
    class Failing:
        async def __call__(self, exchange: ScriptedExchange) -> None:
            await exchange.head()
            await exchange.event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}})
            await exchange.event({"type": "error", "error": {"type": "overloaded_error", "message": "too much"}})

    with ScriptedEndpoint(default=Failing(), route="/messages") as endpoint:
        words = ("--url", endpoint.url, "--target", "messages", "--retries", 0, "--no-html")
        ran = bench(*words, "-d", lines(*prompts(1)), "--out", tmp_path / "run")
    assert ran.exit_code == 1
    (record,) = records()
    assert record.error_kind == "error_event"
    assert "too much" in record.error
