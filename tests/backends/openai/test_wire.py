"""Bodies for endpoints: what requests share that differ in their pictures alone, and what they do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from qvl.backends.openai.wire import Dialect, request_body
from qvl.media.document import Document
from qvl.media.load_document import load_document
from qvl.media.video import Medium
from qvl.pipeline.parse_request import Draft, draft_request
from qvl.testing.asking import square
from tests.media.papers import BAG, MUG, paper

QUESTIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}, "Which brand?"]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["One: ", {"type": "image_url", "image_url": {"url": "a"}}, " “zwei” 😀"]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "b"}}]},
    ],
    [{"role": "user", "content": "No picture."}],
]
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "max_tokens": 5, "extra": {"x": [1.5, None]}},
    {"response_format": {"type": "json_object"}, "max_pixels": 2048, "cache_salt": "mine"},
]
DIALECTS = [Dialect(), Dialect(max_tokens="max_completion_tokens", pinned=frozenset({"top_k"}), stream_options=False)]


def written(draft: Draft, pictures: Sequence[Medium], model: str, dialect: Dialect) -> Any:
    return json.loads(b"".join(request_body(draft.finished(pictures), model, dialect)))


@pytest.mark.parametrize("messages", QUESTIONS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_body_is_the_same_whatever_was_written_of_its_draft_before(
    messages: list[dict[str, Any]], parameters: dict[str, Any]
) -> None:
    kept = draft_request(messages, **parameters)
    for turn, model, dialect in product(range(3), ("one", "another"), DIALECTS):
        pictures = [square((turn * 40, 9, number)) for number, _ in enumerate(kept.pictures)]
        fresh = draft_request(messages, **parameters)
        assert written(kept, pictures, model, dialect) == written(fresh, pictures, model, dialect)
        for salt in ("of a tenant", "of another"):
            salted = json.loads(b"".join(request_body(kept.finished(pictures).with_salt(salt), model, dialect)))
            other = fresh.finished(pictures).replace(cache_salt=salt)
            assert salted == json.loads(b"".join(request_body(other, model, dialect)))
            assert salted.get("cache_salt") == (salt if dialect.pinned else None)


def test_pages_of_a_document_are_written_where_a_picture_was_before() -> None:
    kept = draft_request(QUESTIONS[0])
    two, one = load_document(paper([MUG, BAG])), load_document(paper([BAG]))
    media_in_turn: list[Medium] = [square(), two, square(), one, two]
    for medium in media_in_turn:
        fresh = draft_request(QUESTIONS[0])
        body = written(kept, [medium], "m", Dialect())
        assert body == written(fresh, [medium], "m", Dialect())
        shown = body["messages"][0]["content"]
        pages = len(medium.pages) if isinstance(medium, Document) else 1
        assert sum(part["type"] == "image_url" for part in shown) == pages
