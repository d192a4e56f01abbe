"""Video, the result of the media gate for a video: the frames that are shown, as Pictures, and their times."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from qvl.errors import RequestError, UnsupportedInputError
from qvl.media.document import Document
from qvl.media.picture import LazyPixels, Picture, _deferred

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from PIL import Image


@dataclass(frozen=True, slots=True)
class Video:
    """A video that passed the media gate. Equal if the source, the frames and their times are equal.

    Args:
        sha256: `sha256:` and the hex digest of the source bytes.
        frames: what is shown of it, all of one size; decoded on first use.
        times: seconds of each frame from the video's first.
        duration: seconds of the whole video.
        fps: its frames a second, on average.
        source: short display name, as of a Picture.
        data: the source bytes; empty in a copy that has the frames alone.
        note: what is said where fewer frames are shown than were asked for.
    """

    sha256: str
    frames: tuple[Picture, ...] = field(repr=False)
    times: tuple[float, ...]
    duration: float = field(compare=False)
    fps: float = field(compare=False)
    source: str = field(compare=False)
    data: bytes = field(repr=False, compare=False)
    note: str = field(default="", repr=False, compare=False)

    @property
    def width(self) -> int:
        return self.frames[0].width

    @property
    def height(self) -> int:
        return self.frames[0].height

    def with_frames(self, frames: Sequence[Picture]) -> Video:
        """Return a copy with its frames in another size."""
        return replace(self, frames=tuple(frames))

    def without_file(self) -> Video:
        """Return a copy without the source bytes, for who is sent its frames."""
        return replace(self, data=b"")

    def to_json(self) -> dict[str, object]:
        """Return what was shown, for records and reports: source, hash, seconds and the times of the frames."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "seconds": round(self.duration, 3),
            "frames": len(self.frames),
            "times": [round(at, 3) for at in self.times],
        }


Medium: TypeAlias = Picture | Video | Document


def pictures_of(media: Iterable[Medium]) -> tuple[Picture, ...]:
    """Return the pictures of `media`, in order; those of a video are its frames, those of a document its pages."""
    return tuple([picture for medium in media for picture in _shown(medium)])


def _shown(medium: Medium) -> tuple[Picture, ...]:
    if isinstance(medium, Document):
        return medium.pages
    return medium.frames if isinstance(medium, Video) else (medium,)


def paged(media: Iterable[Medium]) -> list[Picture | Video]:
    """Return `media` with the pages of each document in its place."""
    shown: list[Picture | Video] = []
    for medium in media:
        shown += medium.pages if isinstance(medium, Document) else (medium,)
    return shown


def still(medium: Medium) -> Picture:
    """Return `medium` if it is a picture, or a document of which one page is shown.

    Raises:
        UnsupportedInputError: it is a video, on which no place can be told.
        RequestError: it is several pages.
    """
    if isinstance(medium, Document):
        if len(medium.pages) != 1:
            what = f"{medium.source} has {len(medium.pages)} pages, and places are told on one"
            raise RequestError(what, hint=f"name one: pages=1, or {medium.source}#page=1", param="pages")
        return medium.pages[0]
    if isinstance(medium, Video):
        what = f"{medium.source} is a video, and places are told on pictures alone"
        raise UnsupportedInputError(what, hint="pass one frame of it as a picture", param="messages")
    return medium


class FrameStore:
    """Decodes the frames of a video together, on first use, and hands each out once; thread-safe.

    Frames are kept until they are taken; if one is asked for again, all are decoded again.

    Args:
        decode: returns all frames, in order.
    """

    def __init__(self, decode: Callable[[], list[Image.Image]]) -> None:
        self._decode = decode
        self._lock = threading.Lock()
        self._kept: dict[int, Image.Image] = {}

    def take(self, number: int) -> Image.Image:
        """Return frame `number`, in mode RGB and its canonical size.

        Raises:
            MediaError: the video is broken, or takes too long to decode.
        """
        with self._lock:
            if number not in self._kept:
                self._kept = dict(enumerate(self._decode()))
            return self._kept.pop(number)

    def picture(self, number: int, sha256: str, size: tuple[int, int], original: tuple[int, int], name: str) -> Picture:
        """Return frame `number` as a Picture that is decoded on first use."""
        lazy = LazyPixels(decode=lambda: self.take(number), large=True)
        return _deferred(sha256, size, name, lazy, original, untouched=False, sized=False)
