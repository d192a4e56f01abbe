"""Schemas of users: whatever pydantic allows is read, remembered and read again."""

from __future__ import annotations

from datetime import date

import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field, create_model, field_validator

from qvl import Pipeline
from qvl.errors import AnalysisError
from tests.pipeline.conftest import TalkingBackend, answering


class Invoice(BaseModel):
    number: str
    total: float


class Odd(BaseModel):
    """Reads by alias, forbids what it does not know, and dumps more and less than it reads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    total: float = Field(alias="totalPrice")
    day: date
    secret: str = Field(exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> float:
        return self.total * 2


def test_a_schema_that_dumps_what_it_cannot_read_is_remembered_all_the_same(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"totalPrice": 2.5, "day": "2026-01-31", "secret": "s"}'))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first, again = (pipe.analyze_result(picture, schema=Odd) for _ in range(2))
    assert (first.value.total, first.value.day, first.value.secret) == (2.5, date(2026, 1, 31), "s")
    assert again.value == first.value
    assert again.result.cache == "hit"


def test_a_kept_analysis_that_no_longer_fits_is_asked_for_again(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"number": "7", "total": 1}', '{"number": "A-7", "total": 1}'))
    stricter = create_model(
        "Invoice",
        __base__=Invoice,
        __doc__=Invoice.__doc__,
        __validators__={"lettered": field_validator("number")(_has_a_letter)},
    )
    with Pipeline(backend=backend, cache="memory:") as pipe:
        assert pipe.analyze(picture, schema=Invoice).number == "7"
        found = [pipe.analyze_result(picture, schema=stricter) for _ in range(2)]
    assert [(item.value.number, item.result.cache) for item in found] == [("A-7", "miss"), ("A-7", "hit")]


def _has_a_letter(value: str) -> str:
    if not any(char.isalpha() for char in value):
        raise ValueError("needs a letter")
    return value


class Bills(RootModel[list[Invoice]]):
    """All invoices on the picture."""


class Named(RootModel[Invoice]):
    """One invoice."""


def test_a_schema_that_is_a_list_is_asked_for_in_an_object_and_given_as_a_list(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"answer": [{"number": "A-1", "total": 2.5}]}'))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first, again = (pipe.analyze_result(picture, schema=Bills) for _ in range(2))
    assert first.value == again.value == Bills([Invoice(number="A-1", total=2.5)])
    assert again.result.cache == "hit"
    assert set(first.field_confidence) <= {"0.number", "0.total"}


def test_a_root_that_is_an_object_stays_one(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"number": "A-1", "total": 2.5}'))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        assert pipe.analyze(picture, schema=Named).root.total == 2.5


def test_the_bundled_model_and_a_schema_of_ones_own_are_told_apart_from_too_few_tokens(picture: Image.Image) -> None:
    for model, schema, told in (("bundled", Invoice, True), ("bundled", None, False), ("real", Invoice, False)):
        backend = TalkingBackend(model, reply=answering("I would rather not say."))
        with Pipeline(backend=backend, cache="off") as pipe, pytest.raises(AnalysisError) as caught:
            pipe.analyze(picture, schema=schema)  # type: ignore[call-overload]
        assert ("name a real one" in str(caught.value)) is told
