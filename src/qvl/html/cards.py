"""The cards of a notebook and of the HTML report: the picture beside the answer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Protocol

from qvl.errors import QvlError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_CARD = "display:flex;gap:1em;align-items:flex-start;font-family:sans-serif"


class ShownPicture(Protocol):
    """The properties of a picture that a card shows."""

    @property
    def source(self) -> str: ...
    @property
    def original(self) -> tuple[int, int]: ...

    def thumbnail(self, edge: int = ...) -> ShownPicture: ...

    def data_url(self) -> str: ...


class ShownVideo(Protocol):
    """The properties of a video that a strip shows."""

    @property
    def source(self) -> str: ...
    @property
    def frames(self) -> Sequence[ShownPicture]: ...
    @property
    def times(self) -> Sequence[float]: ...
    @property
    def duration(self) -> float: ...


def thumbnail_html(picture: ShownPicture, edge: int = 192) -> str:
    """Return an `<img>` with the picture inside, so that the page needs no other file."""
    try:
        small = picture.thumbnail(edge)
        return f'<img src="{small.data_url()}" alt="{escape(picture.source)}" style="max-width:{edge}px">'
    except QvlError as exc:
        return f"<span>{escape(exc.message)}</span>"


def strip_html(video: ShownVideo, most: int = 12) -> str:
    """Return a strip of at most `most` frames of a video, evenly spread, each above its time."""
    count = len(video.frames)
    step = max(1, -(-count // most))
    cells = "".join(
        f'<figure style="margin:0">{thumbnail_html(video.frames[at], 96)}'
        f'<figcaption style="font-size:smaller">{video.times[at]:.1f} s</figcaption></figure>'
        for at in range(0, count, step)
    )
    caption = f"{escape(video.source)}: {count} frames of {video.duration:.1f} s"
    return f'<div>{caption}<div style="display:flex;flex-wrap:wrap;gap:4px">{cells}</div></div>'


def media_html(pictures: Sequence[ShownPicture], videos: Sequence[ShownVideo]) -> str:
    """Return pictures and a strip of each video, whose frames are among `pictures`."""
    frames = {id(frame) for video in videos for frame in video.frames}
    stills = [thumbnail_html(picture) for picture in pictures if id(picture) not in frames]
    return "".join([*stills, *map(strip_html, videos)])


def table_html(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of two columns; names and values are escaped."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def answer_html(
    pictures: Sequence[ShownPicture], texts: Iterable[str], facts: str, videos: Sequence[ShownVideo] = ()
) -> str:
    """Return a card: pictures beside the answers, and below them a line of `facts`."""
    answers = "".join(f'<p style="white-space:pre-wrap">{escape(text)}</p>' for text in texts)
    return card_html(media_html(pictures, videos), answers, facts)


def card_html(images: str, content: str, facts: str) -> str:
    """Return a card of HTML: `images` beside `content`, and below it a line of `facts`, which are text."""
    line = f'<p style="color:gray;font-size:smaller">{escape(facts)}</p>' if facts else ""
    return f'<div style="{_CARD}"><div>{images}</div><div>{content}{line}</div></div>'


def recommendation_html(
    text: str, products: Sequence[Mapping[str, str]], notes: Iterable[str], failed: str | None
) -> str:
    """Return a card: the problem `failed` if not None, `text`, the products as for `products_html`, and the notes."""
    head = f"<p class=failed>{escape(failed)} failed</p>" if failed else ""
    tail = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    body = f'<p style="white-space:pre-wrap">{escape(text)}</p>'
    return f'<div style="font-family:sans-serif">{head}{body}{products_html(products)}{tail}</div>'


def products_html(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table of products, each with `name`, `url`, `price`, `id` and `why`; "" where there are none."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        name = escape(row["name"])
        if row["url"].startswith(("http://", "https://")):
            name = f'<a href="{escape(row["url"])}">{name}</a>'
        price, number, why = escape(row["price"]), escape(row["id"]), escape(row["why"])
        lines.append(f"<tr><td>{name}</td><td class=price>{price}</td><td>{number}</td><td>{why}</td></tr>")
    return f"<table><tr><th>product<th>price<th>id<th>why</tr>{''.join(lines)}</table>"
