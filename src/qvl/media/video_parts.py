"""Loaded pictures, videos and documents as parts of messages; videos in the form of those who take pictures alone."""

from __future__ import annotations

import dataclasses

from qvl.media.document import Document
from qvl.media.video import Medium, Video
from qvl.types import ChatRequest, ImagePart, Part, TextPart, VideoPart


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


def as_taken(request: ChatRequest, *, videos: int) -> ChatRequest:
    """Return the request as a backend gets it that takes at most so many `videos` as such."""
    return request if len(request.videos) <= videos else as_timed_pictures(request)


def as_timed_pictures(request: ChatRequest) -> ChatRequest:
    """Return the request with each frame of its videos as a picture, behind a text with its time.

    `<1.5 seconds>` is the form in which Qwen3-VL knows times. The request itself if it has no video.
    """
    if not request.videos:
        return request
    messages = []
    for message in request.messages:
        parts: list[Part] = []
        for part in message.parts:
            parts += _timed(part.video) if isinstance(part, VideoPart) else (part,)
        messages.append(dataclasses.replace(message, parts=tuple(parts)))
    return request.replace(messages=tuple(messages))


def _timed(video: Video) -> list[Part]:
    parts: list[Part] = []
    for at, frame in zip(video.times, video.frames, strict=True):
        parts += (TextPart(f"<{at:.1f} seconds>"), ImagePart(frame))
    return parts
