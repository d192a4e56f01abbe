"""Which pages of a document are shown: `pages="1-3,7"` as users write it, and `bill.pdf#page=2` in a name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import unquote

from qvl.errors import ConfigError, MediaError

PagesLike: TypeAlias = "str | int | Sequence[int] | PageChoice"
_SPAN: Final = re.compile(r"([0-9]{1,9})(?:\s*(-)\s*([0-9]{1,9})?)?")
# RFC 8118 names `page`; further parameters of a viewer, such as zoom, may stand beside it.
_FRAGMENT: Final = re.compile(r"#([^#/\\]*)$")
_FRAGMENT_LENGTH: Final = 200
_MAX_TEXT: Final = 1_000
_FORM: Final = 'pages="3", "1-3", "2,5-7" or "4-" (to the last); the first page is 1'


@dataclass(frozen=True, slots=True)
class PageChoice:
    """Spans of pages in the order in which they are shown: (first, last), from 1; last is None for the document's end.

    Without spans it is all pages.
    """

    spans: tuple[tuple[int, int | None], ...] = ()

    def __str__(self) -> str:
        return ",".join(
            str(first) if first == last else f"{first}-" if last is None else f"{first}-{last}"
            for first, last in self.spans
        )

    def of(self, count: int, name: str) -> list[range]:
        """Return the chosen pages of a document of `count` pages, as ranges of numbers from 1.

        Raises:
            MediaError: a page is beyond the last one.
        """
        chosen = []
        for first, last in self.spans or ((1, None),):
            end = count if last is None else last
            beyond = next((number for number in (first, end) if number > count), None)
            if beyond is not None:
                pages = "1 page" if count == 1 else f"{count} pages"
                raise MediaError(f"{name} has {pages}, so there is no page {beyond}", hint=_FORM, code=NO_SUCH_PAGE)
            chosen.append(range(first, end + 1))
        return chosen


NO_SUCH_PAGE: Final = "document_page_missing"
ALL_PAGES: Final = PageChoice()


def read_pages(value: object, param: str = "pages") -> PageChoice:
    """Return the choice that `value` writes: a number, a list of numbers, or a text such as "1-3,7" or "4-".

    Raises:
        ConfigError: it is none of these, counts from 0, or runs backwards.
    """
    if isinstance(value, PageChoice):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        texts = [str(item) for item in value if isinstance(item, int) and not isinstance(item, bool)]
        if len(texts) != len(value):
            raise _wrong(value, param)
    elif isinstance(value, str) and len(value) <= _MAX_TEXT:
        texts = [piece.strip() for piece in value.split(",")]
    else:
        raise _wrong(value, param)
    spans = []
    for text in texts:
        match = _SPAN.fullmatch(text)
        if match is None:
            raise _wrong(value, param)
        first = int(match[1])
        last = first if match[2] is None else None if match[3] is None else int(match[3])
        if first < 1 or (last is not None and last < first):
            raise _wrong(value, param)
        spans.append((first, last))
    if not spans:
        raise _wrong(value, param)
    return PageChoice(tuple(spans))


def _wrong(value: object, param: str) -> ConfigError:
    return ConfigError(f"{param}={str(value)[:60]!r} names no pages", hint=_FORM, param=param)


def apart(source: object) -> tuple[object, PageChoice | None]:
    """Return (source, None), or the source without its `#page=2` and the choice that this names.

    A file whose name ends so is that file. Fragments that name no page, and other kinds of sources, stay as they are.

    Raises:
        MediaError: `#page=` names no pages.
    """
    path = isinstance(source, os.PathLike)
    text = os.fsdecode(source) if isinstance(source, os.PathLike) else source
    if not isinstance(text, str) or (match := _FRAGMENT.search(text[-_FRAGMENT_LENGTH:])) is None:
        return source, None
    named = [piece.partition("=") for piece in match[1].split("&")]
    value = next((value for name, _, value in named if name.strip().lower() in ("page", "pages")), None)
    if value is None or (text[:5].lower() not in ("data:", "http:", "https") and os.path.exists(text)):
        return source, None
    try:
        choice = read_pages(unquote(value), "#page")
    except ConfigError as exc:
        raise MediaError(exc.message, hint='"bill.pdf#page=2", "bill.pdf#page=1-3"', code=NO_SUCH_PAGE) from None
    bare = text[: -len(match[0])]
    return (type(source)(bare) if path else bare), choice  # type: ignore[call-arg]
