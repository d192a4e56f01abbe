"""Bodies without their pictures, read once for all that are equal then, as those that ask about a catalogue are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from pydantic import BaseModel

from qvl.server.request_body import without_byte_order_mark

if TYPE_CHECKING:
    from qvl.backends.base import Capabilities
    from qvl.pipeline.parse_request import Draft

BodyT_co = TypeVar("BodyT_co", bound=BaseModel, covariant=True)
MOST_KEPT: Final = 64
# In bytes, without pictures. Read, a body made for that takes some eighty times as many, so all of them 40 MiB; what is
# written of one for an endpoint takes up to six times as many.
LONGEST_KEPT: Final = 8 * 1024


class KnownBody(Generic[BodyT_co]):
    """A validated body without its pictures, and its draft. Requests share it, so nothing of it may be changed.

    Attributes:
        body: the body, with a mark in the place of each picture's base64.
        lifts_all: whether every mark stands where a picture's source is read; None if nobody looked yet.

    Raises:
        ValidationError: invalid JSON or fields.
        HttpError: 400, the body is not UTF-8.
    """

    def __init__(self, schema: type[BodyT_co], body: bytes) -> None:
        self.body = schema.model_validate_json(without_byte_order_mark(body))
        self.lifts_all: bool | None = None
        self._draft: Draft | None = None
        self._have: Capabilities | None = None

    def draft(self, have: Capabilities, adapter: str, make: Callable[[], Draft]) -> Draft:
        """Return what `make` returns, or did for a backend that supports the same, and the same adapter."""
        if self._draft is None or self._have != have or self._draft.request.adapter != adapter:
            self._draft, self._have = make(), have
        return self._draft


def known_body_of(tenant: str, schema: type[BodyT_co], body: bytes) -> KnownBody[BodyT_co]:
    """Return a new KnownBody of `tenant`: each has its own, so that nobody learns from its time what others asked."""
    return KnownBody(schema, body)
