"""The text of a page as Qwen's models write it: Markdown, or HTML with a box (`data-bbox`) at each element.

What comes out is safe to open: of HTML only harmless elements and attributes are kept, each closed within its page.
Boxes are thousandths of the page, whatever the model's own coordinates are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from typing import Final, Literal, TypeAlias

from qvl.evidence.coordinates import THOUSAND, Frame
from qvl.evidence.shapes import Box
from qvl.types import JsonObject

ReadForm: TypeAlias = Literal["markdown", "html"]
FORMS: Final[tuple[ReadForm, ...]] = ("markdown", "html")
# Qwen's models were trained on these as they stand; others are told what is meant.
TRAINED: Final[dict[ReadForm, str]] = {"markdown": "qwenvl markdown", "html": "qwenvl html"}
SPELLED_OUT: Final[dict[ReadForm, str]] = {
    "markdown": (
        "Write everything on this page as Markdown, in reading order, and nothing else. Where there is a picture, write"
        " <!-- Image (x1, y1, x2, y2) --> with its box, coordinates from 0 to 1000."
    ),
    "html": (
        "Write everything on this page as HTML, in reading order, and nothing else: h1 to h6, p, ul, ol, li, table, tr,"
        ' th, td, img, div. Give each element its box on the page as data-bbox="x1 y1 x2 y2", coordinates from 0 to'
        " 1000."
    ),
}
_FENCE: Final = re.compile(r"\A\s*```[a-zA-Z]*[ \t]*\n(.*?)(?:\n?```\s*)?\Z", re.DOTALL)
_NUMBER: Final = r"-?\d+(?:\.\d+)?"
_MARK: Final = re.compile(rf"<!--\s*(\w+)\s*\(\s*({_NUMBER}(?:\s*,\s*{_NUMBER}){{3}})\s*\)\s*-->")
_NUMBERS: Final = re.compile(_NUMBER)
_DROPPED: Final = frozenset({"script", "style", "head", "title", "template", "iframe", "object", "svg", "math"})
_VOID: Final = frozenset({"br", "hr", "img"})
_KEPT: Final = frozenset(
    {"h1", "h2", "h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "dl", "dt", "dd", "div", "span", "section", "header"}
    | {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "footer", "figure", "figcaption", "blockquote"}
    | {"pre", "code", "b", "strong", "i", "em", "u", "s", "del", "ins", "sub", "sup", "small", "a", "label", *_VOID}
)
_ATTRIBUTES: Final = frozenset({"class", "alt", "colspan", "rowspan", "start", "type", "checked"})
_LINK: Final = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
_DEEPEST: Final = 100


@dataclass(frozen=True, slots=True)
class PageElement:
    """Something on a page: its kind (`h1`, `table`, `image`), its text, and its box in pixels of the page."""

    kind: str
    text: str
    box: Box

    def to_json(self) -> JsonObject:
        return {"kind": self.kind, "text": self.text, "box": self.box.to_json()}


def read_page(answer: str, form: ReadForm, frame: Frame) -> tuple[str, tuple[PageElement, ...]]:
    """Return (the text of a page, what has a box on it) from a model's answer."""
    fenced = _FENCE.match(answer)
    answer = answer if fenced is None else fenced[1]
    return _markdown(answer, frame) if form == "markdown" else _html(answer, frame)


def _thousandths(box: Box) -> tuple[int, int, int, int]:
    across, down = THOUSAND / box.width, THOUSAND / box.height
    return round(box.x1 * across), round(box.y1 * down), round(box.x2 * across), round(box.y2 * down)


def _box(text: str, frame: Frame) -> Box | None:
    return frame.box([float(number) for number in _NUMBERS.findall(text[:200])])


def _markdown(answer: str, frame: Frame) -> tuple[str, tuple[PageElement, ...]]:
    found = []

    def mapped(match: re.Match[str]) -> str:
        box = _box(match[2], frame)
        if box is None:
            return f"<!-- {match[1]} -->"
        found.append(PageElement(match[1].lower(), "", box))
        return f"<!-- {match[1]} ({', '.join(map(str, _thousandths(box)))}) -->"

    return _MARK.sub(mapped, answer).strip() + "\n", tuple(found)


def _html(answer: str, frame: Frame) -> tuple[str, tuple[PageElement, ...]]:
    writer = _Writer(lambda text: _box(text, frame))
    writer.feed(answer)
    writer.close()
    return writer.finished(), tuple(writer.found())


class _Open:
    """An element that is open: its tag, kind and box, and the text within it so far."""

    def __init__(self, tag: str, kind: str, box: Box | None, at: int) -> None:
        self.tag, self.kind, self.box, self.at = tag, kind, box, at
        self.text: list[str] = []


class _Writer(HTMLParser):
    """Writes what is harmless of the HTML that it is fed."""

    def __init__(self, box_of: Callable[[str], Box | None]) -> None:
        super().__init__(convert_charrefs=True)
        self._box_of = box_of
        self._out: list[str] = []
        self._stack: list[_Open] = []
        self._found: list[tuple[int, PageElement]] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped or tag in _DROPPED:
            # Within what is dropped only its own kind nests.
            if not self._skipped or tag == self._skipped[0]:
                self._skipped.append(tag)
            return
        if tag not in _KEPT or len(self._stack) >= _DEEPEST:
            return
        given = {name: value or "" for name, value in attrs}
        box = self._box_of(given["data-bbox"]) if "data-bbox" in given else None
        kept = {name: value for name, value in given.items() if name in _ATTRIBUTES}
        if tag == "a" and _LINK.match(given.get("href", "")):
            kept["href"] = given["href"]
        if box is not None:
            kept["data-bbox"] = " ".join(map(str, _thousandths(box)))
        written = "".join([f' {name}="{escape(value)}"' for name, value in kept.items()])
        self._out.append(f"<{tag}{written}>")
        kind = given.get("class") or ("image" if tag == "img" else tag)
        if tag in _VOID:
            if box is not None:
                self._found.append((len(self._out), PageElement(kind, given.get("alt", ""), box)))
            return
        self._stack.append(_Open(tag, kind, box, len(self._out)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _DROPPED:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
            return
        if not any(element.tag == tag for element in self._stack):
            return
        while self._close() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        self._out.append(escape(data, quote=False))
        for element in self._stack:
            element.text.append(data)

    def _close(self) -> str:
        element = self._stack.pop()
        self._out.append(f"</{element.tag}>")
        if element.box is not None:
            text = " ".join("".join(element.text).split())
            self._found.append((element.at, PageElement(element.kind, text, element.box)))
        return element.tag

    def finished(self) -> str:
        while self._stack:
            self._close()
        return "".join(self._out).strip() + "\n"

    def found(self) -> list[PageElement]:
        """Return the elements with a box, in the order in which they begin."""
        return [element for _, element in sorted(self._found, key=lambda pair: pair[0])]
