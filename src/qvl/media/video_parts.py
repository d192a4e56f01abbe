"""Loaded pictures, videos and documents as parts of messages; videos in the form of those who take pictures alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from qvl.media.document import Document
from qvl.media.video import Medium, Video
from qvl.types import ChatRequest, ImagePart, Part, TextPart, VideoPart

# Of a character beyond ASCII in JSON; and of everything beside texts, pictures and videos.
_ESCAPED: Final = 6
_AROUND: Final = 1 << 16


def media_parts(medium: Medium) -> tuple[Part, ...]:
    """Return the parts that show a loaded picture, video or document: of the last a picture behind each page's number.

    A document of one page is its picture alone.
    """
    if not isinstance(medium, Document):
        return (VideoPart(medium) if isinstance(medium, Video) else ImagePart(medium),)
    if medium.count == 1:
        return (ImagePart(medium.pages[0]),)
    parts: list[Part] = []
    for number, page in zip(medium.numbers, medium.pages, strict=True):
        parts += (TextPart(f"Page {number}:"), ImagePart(page))
    return tuple(parts)


def fewer_frames(videos: Sequence[Video]) -> tuple[str, ...]:
    """Return the notes on videos of which fewer frames are shown than were asked for."""
    return tuple(f"{name}: {video.note}" for name, video in _named(videos) if video.note)


def sent_as_pictures(videos: Sequence[Video], why: str) -> tuple[str, ...]:
    """Return the notes on videos whose frames are sent as pictures; `why` says who takes no more, and what."""
    return tuple(
        f"{name}: sent as {len(video.frames)} picture{'s' if len(video.frames) > 1 else ''}, each behind its time,"
        f" since {why}"
        for name, video in _named(videos)
    )


def _named(videos: Sequence[Video]) -> Iterator[tuple[str, Video]]:
    """Yield each video with what it is called in notes: the number of one that came without a name."""
    for number, video in enumerate(videos, start=1):
        yield f"video {number}" if video.source.startswith(("data:", "<")) else video.source, video


def bytes_with_files(request: ChatRequest) -> int:
    """Return at most how many bytes a request is as JSON, with its videos as the files that they came as."""
    characters = sum(len(message.text) for message in request.messages)
    # A picture that was changed is written as PNG, which no picture makes much larger than its pixels.
    pictures = [
        len(part.picture.data) if part.picture.untouched else 3 * part.picture.width * part.picture.height
        for message in request.messages
        for part in message.parts
        if isinstance(part, ImagePart)
    ]
    files = sum(pictures) + sum(len(video.data) for video in request.videos)
    return files * 4 // 3 + characters * _ESCAPED + _AROUND


def without_files(request: ChatRequest) -> ChatRequest:
    """Return the request with the frames of its videos and without their files, for another process."""
    return _replaced(request, lambda video: [VideoPart(video.without_file())])


def as_timed_pictures(request: ChatRequest) -> ChatRequest:
    """Return the request with each frame of its videos as a picture, behind a text with its time.

    `<1.5 seconds>` is the form in which Qwen3-VL knows times. The request itself if it has no video.
    """
    return _replaced(request, _timed)


def _replaced(request: ChatRequest, parts_of: Callable[[Video], list[Part]]) -> ChatRequest:
    if not request.videos:
        return request
    messages = []
    for message in request.messages:
        parts: list[Part] = []
        for part in message.parts:
            parts += parts_of(part.video) if isinstance(part, VideoPart) else (part,)
        messages.append(dataclasses.replace(message, parts=tuple(parts)))
    return request.replace(messages=tuple(messages))


def _timed(video: Video) -> list[Part]:
    parts: list[Part] = []
    for at, frame in zip(video.times, video.frames, strict=True):
        parts += (TextPart(f"<{at:.1f} seconds>"), ImagePart(frame))
    return parts
