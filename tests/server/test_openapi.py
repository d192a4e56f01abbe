"""The server against its own OpenAPI document."""

from __future__ import annotations

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import TypeAdapter

from qvl.server import answers
from tests.server.conftest import Running, question
from tests.server.test_chat import events

OF_TOKENS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens")


def test_every_operation_is_documented_with_its_errors(server: Running) -> None:
    told = server.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/analyze", "/ready"} <= set(told["paths"])
    for methods in told["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert "200" in operation["responses"]


def test_the_examples_are_answered(server: Running) -> None:
    told = server.get("/openapi.json").json()
    # The echo has no tokens to tell; `test_tokens.py` asks those examples of a model that has.
    for path, methods in told["paths"].items():
        example = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in example and path not in OF_TOKENS:
            assert server.post(path, example["example"]).status_code == 200, path


def test_answers_fit_openais_own_types(server: Running) -> None:
    body = question("hello there")
    chat = server.post("/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 1}).json()
    ChatCompletion.model_validate(chat, strict=True)
    for event in events(server.post("/v1/chat/completions", {**body, "stream": True}).text):
        ChatCompletionChunk.model_validate(event, strict=True)
    Completion.model_validate(server.post("/v1/completions", {"prompt": "x", "logprobs": 1}).json(), strict=True)
    Response.model_validate(server.post("/v1/responses", {"input": "hello"}).json())


def test_answers_fit_the_types_that_the_document_is_made_from(server: Running) -> None:
    body = {**question("hello there"), "logprobs": True, "top_logprobs": 1}
    for kind, answer in (
        (answers.ChatCompletion, server.post("/v1/chat/completions", body)),
        (answers.Completion, server.post("/v1/completions", {"prompt": "x", "logprobs": 1})),
        (answers.Response, server.post("/v1/responses", {"input": "hello"})),
        (answers.ModelList, server.get("/v1/models")),
        (answers.Model, server.get("/v1/models/echo-vl")),
        (answers.Health, server.get("/health")),
        (answers.Ready, server.get("/ready")),
        (answers.Version, server.get("/version")),
        (answers.Error, server.get("/nope")),
    ):
        TypeAdapter(kind).validate_json(answer.content, strict=True)
        assert set(answer.json()) <= set(kind.__annotations__)


@pytest.mark.slow
def test_schemathesis_finds_nothing(server: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    quick = settings(
        max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
    )
    for found in schema.get_all_operations():
        operation = found.ok()

        def check(case) -> None:
            # What a backend honours is no matter of shape, so a well-shaped request may be refused.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        quick(given(operation.as_strategy())(check))()
    assert server.get("/ready").status_code == 200
