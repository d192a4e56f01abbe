"""Loading and decoding of a request's pictures, several at a time; errors name the picture's number."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, cast

from qvl.errors import MediaError, RequestError
from qvl.media import base64_codec, gate
from qvl.media.base64_codec import Base64Picture
from qvl.media.document import Document
from qvl.media.document_head import is_document, looks_like_document
from qvl.media.image_header import sniff
from qvl.media.load_document import aload_document, in_child_thread, load_document
from qvl.media.load_video import aload_video, decode_video, load_video
from qvl.media.page_choice import ALL_PAGES, NO_SUCH_PAGE, apart
from qvl.media.picture import Picture
from qvl.media.smart_resize import NO_LIMITS
from qvl.media.sources import MAX_LABEL, is_address, short
from qvl.media.video import Medium, Video
from qvl.media.video_head import USUAL_PICTURES, looks_like_video
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import ChatRequest, ImagePart, MediaPart, Part, TextPart, VideoPart, map_parts

if TYPE_CHECKING:
    from qvl.media.digest_cache import DigestCache
    from qvl.media.picture import PictureSource
    from qvl.media.policy import MediaPolicy

T = TypeVar("T")
Kind: TypeAlias = Literal["picture", "video", "document"]
LOADED: Final = (Video, Document)

# Characters of base64 that hold what a kind of picture is told by.
_FIRST: Final = 128
# Of one request at a time: what they bring waits in memory.
MAX_FETCHES: Final = 8


async def load_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, *, digests: DigestCache | None = None
) -> list[Medium]:
    """Return the pictures and videos, read and hashed in parallel but not decoded; the first failure cancels the rest.

    Raises:
        MediaError: a picture cannot be read, for the reasons of `qvl.media.aload`.
        RequestError: a pixel limit of a picture exceeds that of `policy`, or there are more videos than it allows.
    """
    if not pictures:
        return []
    told = _told(pictures, policy, files=policy.allow_files)
    fetching = asyncio.Semaphore(MAX_FETCHES)
    return await _together([_numbered(number, _load(*one, fetching, digests)) for number, one in enumerate(told)])


async def _load(
    unread: UnreadPicture, kind: Kind, policy: MediaPolicy, fetching: asyncio.Semaphore, digests: DigestCache | None
) -> Medium:
    source = unread.source
    if isinstance(source, LOADED):
        return source
    if gate.is_remote(source):
        async with fetching:
            if kind == "video":
                return await aload_video(source, policy, unread.sampling)
            return await _fetched(unread, policy, digests)
    if kind == "video":
        return await aload_video(source, policy, unread.sampling)
    if kind == "document":
        return await aload_document(source, policy, unread.pages)
    return await gate.aload(source, policy, decode=False, digests=digests)


def read_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, digests: DigestCache, *, may_wait: bool
) -> list[Medium] | None:
    """Return the pictures, read and hashed in this thread; None if `load_pictures` would be faster or a URL is one.

    Small pictures in memory are always read here, since a thread switch takes longer; so is a single local one
    if `may_wait`.

    Raises:
        MediaError: a picture cannot be read.
    """
    ready: list[Medium] = []
    alone = may_wait and is_one_local(pictures)
    for number, (unread, kind, own) in enumerate(_told(pictures, policy, files=may_wait and policy.allow_files)):
        source = unread.source
        with naming(number):
            if isinstance(source, LOADED):
                ready.append(source)
            elif kind == "picture" and not alone:
                if (now := gate.load_now(source, own, digests=digests)) is None:
                    return None
                ready.append(now)
            elif not alone:
                return None
            elif kind == "document":
                ready.append(load_document(source, own, unread.pages))
            elif kind == "video":
                ready.append(load_video(source, own, unread.sampling))
            else:
                ready.append(gate.load(source, own, decode=False, digests=digests))
    return ready


def _told(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, *, files: bool
) -> list[tuple[UnreadPicture, Kind, MediaPolicy]]:
    """Return each picture with its pages apart from its name, what it is read as, and its own policy.

    Raises:
        MediaError: pages of no document are asked for.
        RequestError: a pixel limit of a picture exceeds that of `policy`, or there are more videos than it allows.
    """
    told: list[tuple[UnreadPicture, Kind, MediaPolicy]] = []
    for number, picture in enumerate(pictures):
        # A policy checks itself whenever one is made, so only where a picture has limits of its own.
        own = policy
        if picture.limits != NO_LIMITS:
            own = dataclasses.replace(policy, limits=picture.limits.checked(policy.max_pixels))
        try:
            unread = named_apart(picture)
            told.append((unread, _kind(unread, files=files), own))
        except MediaError as exc:
            exc.picture = number
            raise
    videos = sum(kind == "video" for _, kind, _ in told)
    if policy.max_videos is not None and videos > policy.max_videos:
        what = f"{videos} videos in one request, where at most {policy.max_videos} are allowed"
        hint = "send fewer, or raise qvl-serve --limit-mm-per-prompt (max_videos of the MediaPolicy)"
        raise RequestError(what, hint=hint, param="messages")
    return told


def named_apart(unread: UnreadPicture) -> UnreadPicture:
    """Return `unread` with the pages that its name chooses, as `bill.pdf#page=2` does, apart from the name.

    Raises:
        MediaError: `#page=` names no pages.
    """
    source, pages = apart(unread.source)
    if pages is None:
        return unread
    return unread.with_source(cast("PictureSource", source), pages)


def _kind(unread: UnreadPicture, *, files: bool) -> Kind:
    """Return what `unread` is read as; with `files` False none is opened. A URL tells only when it is fetched.

    Raises:
        MediaError: pages of something else are asked for.
    """
    source = unread.source
    if isinstance(source, LOADED):
        return "document" if isinstance(source, Document) else "video"
    if isinstance(source, Base64Picture) and unread.pages is None and not unread.video and _is_usual(source):
        return "picture"
    document = _is_document(unread, files=files)
    if unread.video or looks_like_video(source, files=files):
        return "video"
    return "document" if document else "picture"


def _is_usual(source: Base64Picture) -> bool:
    """True for a picture whose label and first bytes both say so, as those of nearly all that come."""
    return source.head.startswith("data:image/") and source.data.startswith(USUAL_PICTURES)


def _is_document(unread: UnreadPicture, *, files: bool) -> bool:
    source = unread.source
    if looks_like_document(source, files=files):
        return True
    if unread.pages is None and not unread.document:
        return False
    later = isinstance(source, str | os.PathLike | io.IOBase) and not is_address(source)
    if gate.is_remote(cast("PictureSource", source)) or (later and not files):
        return False
    if unread.document and not _is_picture(source):
        return True
    if unread.pages is not None:
        raise _without_pages(source)
    return False


def _is_picture(source: object) -> bool:
    """True for what a part calls a document though it is a picture: that is read as what it is."""
    if isinstance(source, Base64Picture):
        label, data = source.head, source.data
    elif isinstance(source, str):
        label, data = source, _first_bytes(source)
    else:
        return isinstance(source, Picture)
    return label[:11].lower() == "data:image/" or bool(sniff(data))


def _first_bytes(url: str) -> bytes:
    """Return the first bytes of a data: URL of base64; none if it is no such URL, or not strict."""
    _, _, text = url[: MAX_LABEL + _FIRST].partition(";base64,")
    with suppress(ValueError):
        return base64_codec.decoded(text[:_FIRST])
    return b""


def _without_pages(source: object) -> MediaError:
    named = source.head if isinstance(source, Base64Picture) else source
    if isinstance(named, str) and named.strip()[:5].lower() == "data:":
        # Its media type, and none of its base64.
        named = named.strip().partition(",")[0].partition(";")[0]
    name = short(str(named)) if isinstance(named, str | os.PathLike) else "a picture"
    hint = "pages are those of PDFs; name them at the document alone: bill.pdf#page=2"
    return MediaError(f"{name} is not a PDF, so no pages can be chosen", hint=hint, code=NO_SUCH_PAGE)


async def _fetched(unread: UnreadPicture, policy: MediaPolicy, digests: DigestCache | None) -> Medium:
    """Return what a URL has: a picture or a document, by its bytes."""
    data, name = await gate.fetch(cast("str", unread.source), policy)
    if is_document(data) or (unread.document and not sniff(data)):
        from qvl.media.document_file import read_document

        return await in_child_thread(lambda: read_document(data, name, policy, unread.pages or ALL_PAGES))
    if unread.pages is not None:
        raise _without_pages(name)
    return await gate.afrom_bytes(data, name, policy, decode=False, digests=digests)


def is_one_local(pictures: Sequence[UnreadPicture]) -> bool:
    """Return True if there is exactly one picture and it is not a URL to fetch."""
    source = pictures[0].source if len(pictures) == 1 else None
    return source is not None and (isinstance(source, LOADED) or not gate.is_remote(source))


async def decode_pictures(request: ChatRequest, *, pixels: bool, videos: bool = True) -> ChatRequest:
    """Return the request with its pictures decoded within their pixel limits, or only verified if not `pixels`.

    With `videos` False their frames stay as they are: the files are sent, and those are decoded elsewhere.

    Raises:
        MediaError: a picture is truncated or corrupt.
    """
    pictures = request.pictures
    if not pictures:
        return request
    left = frozenset[int]()
    if request.videos and not videos:
        left = frozenset(id(frame) for video in request.videos for frame in video.frames)
    elif videos:
        for video in request.videos:
            await decode_video(video)
    pages = [at for at, page in enumerate(pictures) if page.whole is not None]
    if pages:
        numbers = _numbers(request)
        await _together([_numbered(numbers[at], in_child_thread(pictures[at].hold)) for at in pages])
    waiting = []
    for at, picture in enumerate(pictures):
        try:
            if id(picture) not in left and not gate.is_ready(picture, request.max_pixels, pixels=pixels):
                waiting.append(at)
        except MediaError as exc:
            exc.picture = _numbers(request)[at]
            raise
    if not waiting:
        return request
    numbers = _numbers(request)
    readying = [_numbered(numbers[at], gate.readied(pictures[at], request.max_pixels, pixels=pixels)) for at in waiting]
    done = dict(zip(waiting, await _together(readying), strict=True))
    return _with_pictures(request, pictures, [done.get(at, picture) for at, picture in enumerate(pictures)])


def _numbers(request: ChatRequest) -> list[int]:
    """Return for each picture of the request the number of what the user sent: a picture, a video or a document."""
    numbers: list[int] = []
    number, whole = -1, None
    for part in (part for message in request.messages for part in message.parts if not isinstance(part, TextPart)):
        pictures = part.video.frames if isinstance(part, VideoPart) else (part.picture,)
        same = whole is not None and pictures[0].whole is whole
        number, whole = number + (not same), pictures[0].whole
        numbers += [number] * len(pictures)
    return numbers


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


class naming:  # noqa: N801 - a context manager, which costs less as a class than as a generator
    """Adds the picture's number to any MediaError raised in the context."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MediaError):
            error.picture = self._number


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
