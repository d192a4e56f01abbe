"""`read()`: the text of a document page by page, each a request of its own that the cache keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from qvl.errors import ConfigError, ContextLengthError, QvlError
from qvl.evidence.coordinates import Frame
from qvl.evidence.page_text import FORMS, SPELLED_OUT, TRAINED, PageElement, ReadForm, read_page
from qvl.media.video import paged, still
from qvl.pipeline.call import ChatCall
from qvl.pipeline.load_pictures import load_pictures
from qvl.pipeline.map_in_order import map_in_order
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.pipeline.parse_request import request_limits, request_pages, unread_pictures
from qvl.types import JsonObject, Result

if TYPE_CHECKING:
    from qvl.caches.policy import CacheMode
    from qvl.media.picture import Picture
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.pipeline.parse_request import RequestParams

MAX_TOKENS: Final = 4096
# Of one document: each is a request of its own, so that only their list must fit in memory.
MOST_PAGES: Final = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPage:
    """One page that was read: its `text` in the form that was asked for, or its `error`.

    Args:
        number: of the page, from 1; a picture is page 1.
        count: how many pages are read.
        text: Markdown, or the HTML of the page's content; "" if it failed.
        elements: what has a box on the page: every element of HTML, pictures and tables of Markdown.
        width: of the page in pixels at the resolution of its boxes; `height` likewise.
        result: the model's answer, its pictures left out.
        error: why the page could not be read.
    """

    number: int
    count: int
    source: str
    text: str = ""
    elements: tuple[PageElement, ...] = ()
    width: int = 0
    height: int = 0
    result: Result | None = None
    error: QvlError | None = None

    @property
    def ok(self) -> bool:
        """True if the page was read."""
        return self.error is None

    @property
    def cut(self) -> bool:
        """True if the answer ended at its longest length, so that text of the page is missing."""
        return self.result is not None and self.result.finish_reason == "length"

    def to_json(self) -> JsonObject:
        """Return the page for records."""
        told: JsonObject = {"page": self.number, "pages": self.count, "source": self.source}
        if self.error is not None:
            return {**told, "error": {"code": self.error.code, "message": self.error.message}}
        assert self.result is not None
        return {
            **told,
            "text": self.text,
            "elements": [element.to_json() for element in self.elements],
            "width": self.width,
            "height": self.height,
            "cut": self.cut,
            "cache": self.result.cache,
            "request_id": self.result.request_id,
        }


async def read_pages_of(
    executor: Executor,
    document: PictureLike,
    form: ReadForm,
    concurrency: int,
    cache: CacheMode | None,
    params: RequestParams,
) -> AsyncGenerator[ReadPage, None]:
    """Yield the pages of a document in their order; see `AsyncPipeline.read`."""
    if form not in FORMS:
        raise ConfigError(f"unknown form {str(form)[:40]!r}", hint=", ".join(FORMS), param="form")
    params = params.copy()
    choice = request_pages(params.pop("pages", None))
    limits = request_limits(params.get("max_pixels"), params.get("min_pixels"), {})
    unread = unread_pictures([document], UnreadPicture("", limits, pages=choice))
    policy = dataclasses.replace(executor.media, max_pages=MOST_PAGES)
    (medium,) = await load_pictures(unread, policy, digests=executor.digests)
    pages = [still(page) for page in paged([medium])]
    numbers: tuple[int, ...] = getattr(medium, "numbers", (1,))
    if executor.backend.peek_identity() is None:
        await executor.open()
    told = TRAINED if "qwen" in executor.backend.model.lower() else SPELLED_OUT
    params.pop("request_id", None)
    own_length = params.get("max_tokens") is None

    async def one(page: Picture) -> tuple[ReadPage, Result | None]:
        content = [{"type": "image", "image": page}, {"type": "text", "text": told[form]}]
        turn = {"role": "user", "content": content}
        try:
            long = params | ({"max_tokens": MAX_TOKENS} if own_length else {})
            result = await executor.execute(ChatCall([turn], cache, long))
        except ContextLengthError:
            if not own_length:
                raise
            # A short context: what is left of it.
            result = await executor.execute(ChatCall([turn], cache, params))
        text, elements = read_page(result.text, form, Frame.of(0, page, executor.backend.coordinates))
        bare = dataclasses.replace(result, pictures=())
        return ReadPage(0, len(pages), page.source, text, elements, *page.original, bare), result

    async with aclosing(map_in_order(pages, one, concurrency, False)) as items:
        async for item in items:
            if isinstance(item.error, ConfigError):
                raise item.error
            number = numbers[item.index]
            failed = ReadPage(number, len(pages), pages[item.index].source, error=item.error)
            yield failed if item.value is None else dataclasses.replace(item.value, number=number)
