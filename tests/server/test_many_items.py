"""Bodies of very many items: one wrong item is told and no more are looked for, and what is in a text is no item."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from qvl.server.errors import HttpError
from qvl.server.request_body import MAX_ITEMS, PIECE, checked_json
from qvl.server.responses_schemas import ResponsesRequest
from qvl.server.schemas import AnalyzeRequest, ChatCompletionRequest, CompletionRequest

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
MANY = MAX_ITEMS - 10


@pytest.mark.parametrize(
    ("schema", "body", "wrong"),
    [
        (ChatCompletionRequest, lambda many: ASKED | {"stop": many}, 1),
        (ChatCompletionRequest, lambda many: ASKED | {"stop_token_ids": many}, []),
        (ChatCompletionRequest, lambda many: ASKED | {"stop_token_ids": many}, 1),
        (ChatCompletionRequest, lambda many: ASKED | {"tools": many}, 1),
        (ChatCompletionRequest, lambda many: ASKED | {"modalities": many}, 1),
        (ChatCompletionRequest, lambda many: ASKED | {"response_format": {"type": "choice", "choices": many}}, 1),
        (ChatCompletionRequest, lambda many: ASKED | {"structured_outputs": {"choice": many}}, 1),
        (ChatCompletionRequest, lambda many: {"messages": many}, 1),
        (CompletionRequest, lambda many: {"prompt": many}, {}),
        (AnalyzeRequest, lambda many: {"images": many}, 1),
        (ResponsesRequest, lambda many: {"input": many}, 1),
        (ResponsesRequest, lambda many: {"input": "a", "tools": many}, 1),
        (ResponsesRequest, lambda many: {"input": "a", "include": many}, 1),
    ],
)
def test_of_a_list_of_wrong_items_one_is_told(schema: type[BaseModel], body: Any, wrong: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate_json(json.dumps(body([wrong] * MANY)))
    # Each member of a union has its say.
    assert caught.value.error_count() <= 4


def checked(body: bytes) -> bytes:
    return asyncio.run(checked_json(body))


@pytest.mark.parametrize("item", ["1", "[]", "null", " 1"])
def test_a_body_of_too_many_items_is_refused(item: str) -> None:
    with pytest.raises(HttpError, match=f"more than {MAX_ITEMS} items"):
        checked(f'{{"model":[{",".join([item] * (MAX_ITEMS + 2))}]}}'.encode())


@pytest.mark.parametrize("text", [",", '\\",', "\\\\,", '\\\\\\",'])
@pytest.mark.parametrize("shift", range(4))
def test_commas_in_a_text_are_no_items(text: str, shift: int) -> None:
    body = b'{"a":"' + b"x" * shift + text.encode() * (PIECE // 2) + b'"}'
    json.loads(body)
    assert checked(body) == body
    behind = body[:-1] + b',"b":[' + b"1," * (MAX_ITEMS + 1) + b"1]}"
    with pytest.raises(HttpError, match="items"):
        checked(behind)
