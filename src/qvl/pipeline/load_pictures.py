"""Loading and decoding of a request's pictures, several at a time; errors name the picture's number."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from qvl.errors import MediaError
from qvl.media.load_video import aload_video, decode_video, load_video
from qvl.media.smart_resize import NO_LIMITS
from qvl.media.video import Medium, Video
from qvl.media.video_head import looks_like_video
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import ChatRequest, ImagePart, MediaPart, Part, TextPart, VideoPart, map_parts

if TYPE_CHECKING:
    from qvl.media.digest_cache import DigestCache
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy

T = TypeVar("T")

# Of one request at a time: what they bring waits in memory.
MAX_FETCHES: Final = 8


async def load_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, *, digests: DigestCache | None = None
) -> list[Medium]:
    """Return the pictures and videos, read and hashed in parallel but not decoded; the first failure cancels the rest.

    Raises:
        MediaError: a picture cannot be read, for the reasons of `qvl.media.aload`.
        RequestError: a pixel limit of a picture exceeds that of `policy`.
    """
    from qvl.media import gate

    if not pictures:
        return []
    policies = _policies(policy, pictures)
    fetching = asyncio.Semaphore(MAX_FETCHES)

    async def load(unread: UnreadPicture, own: MediaPolicy) -> Medium:
        source = unread.source
        if isinstance(source, Video):
            return source
        async with fetching if gate.is_remote(source) else contextlib.nullcontext():
            if unread.video or looks_like_video(source, files=own.allow_files):
                return await aload_video(source, own, unread.sampling)
            return await gate.aload(source, own, decode=False, digests=digests)

    return await _together(
        [
            _numbered(number, load(picture, own))
            for number, (picture, own) in enumerate(zip(pictures, policies, strict=True))
        ]
    )


def read_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, digests: DigestCache, *, may_wait: bool
) -> list[Medium] | None:
    """Return the pictures, read and hashed in this thread; None if `load_pictures` would be faster or a URL is one.

    Small pictures in memory are always read here, since a thread switch takes longer; so is a single local one
    if `may_wait`.

    Raises:
        MediaError: a picture cannot be read.
    """
    from qvl.media import gate

    ready: list[Medium] = []
    alone = may_wait and is_one_local(pictures)
    for number, (picture, own) in enumerate(zip(pictures, _policies(policy, pictures), strict=True)):
        with naming(number):
            if isinstance(picture.source, Video):
                ready.append(picture.source)
            elif picture.video or looks_like_video(picture.source, files=may_wait and own.allow_files):
                if not alone:
                    return None
                ready.append(load_video(picture.source, own, picture.sampling))
            elif alone:
                ready.append(gate.load(picture.source, own, decode=False, digests=digests))
            elif (now := gate.load_now(picture.source, own, digests=digests)) is not None:
                ready.append(now)
            else:
                return None
    return ready


def is_one_local(pictures: Sequence[UnreadPicture]) -> bool:
    """Return True if there is exactly one picture and it is not a URL to fetch."""
    from qvl.media import gate

    source = pictures[0].source if len(pictures) == 1 else None
    return source is not None and (isinstance(source, Video) or not gate.is_remote(source))


async def decode_pictures(request: ChatRequest, *, pixels: bool) -> ChatRequest:
    """Return the request with its pictures decoded within their pixel limits, or only verified if not `pixels`.

    Raises:
        MediaError: a picture is truncated or corrupt.
    """
    from qvl.media import gate

    pictures = request.pictures
    if not pictures:
        return request
    for video in request.videos:
        await decode_video(video)
    ready = await _together(
        [
            _numbered(number, gate.aready(picture, request.max_pixels, pixels=pixels))
            for number, picture in enumerate(pictures)
        ]
    )
    return _with_pictures(request, pictures, ready)


def _same(part: TextPart) -> Part:
    return part


def _with_pictures(request: ChatRequest, before: Sequence[Picture], after: Sequence[Picture]) -> ChatRequest:
    if all(one is other for one, other in zip(before, after, strict=True)):
        return request
    coming = iter(after)

    def replaced(media: MediaPart) -> Part:
        if isinstance(media, VideoPart):
            return VideoPart(media.video.with_frames([next(coming) for _ in media.video.frames]))
        return ImagePart(next(coming))

    return request.replace(
        messages=tuple(
            dataclasses.replace(message, parts=tuple(map_parts(message.parts, _same, replaced)))
            for message in request.messages
        )
    )


def _policies(policy: MediaPolicy, pictures: Sequence[UnreadPicture]) -> list[MediaPolicy]:
    # A policy checks itself whenever one is made, so only where a picture has limits of its own.
    return [
        policy
        if picture.limits == NO_LIMITS
        else dataclasses.replace(policy, limits=picture.limits.checked(policy.max_pixels))
        for picture in pictures
    ]


@contextlib.contextmanager
def naming(number: int) -> Iterator[None]:
    """Add the picture's number to any QvlError raised in the context."""
    try:
        yield
    except MediaError as exc:
        exc.picture = number
        raise


async def _numbered(number: int, work: Coroutine[object, object, T]) -> T:
    """Return the result of `work`; its error names the picture's number."""
    with naming(number):
        return await work


async def _together(work: Sequence[Coroutine[object, object, T]]) -> list[T]:
    """Return the results in order; when one fails, the rest are cancelled and waited for before the error goes on."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
