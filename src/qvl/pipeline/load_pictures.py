"""The pictures of a request, loaded and decoded several at a time, each fault with its place."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from qvl.errors import MediaError
from qvl.media.smart_resize import NO_LIMITS
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import ChatRequest, ImagePart, Part, TextPart, map_parts

if TYPE_CHECKING:
    from qvl.media.digest_cache import DigestCache
    from qvl.media.picture import Picture, PictureSource
    from qvl.media.policy import MediaPolicy

T = TypeVar("T")

# Of one request at a time: what they bring waits in memory.
MAX_FETCHES: Final = 8


async def load_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, *, seen: DigestCache | None = None
) -> list[Picture]:
    """Return pictures, read and hashed side by side but not decoded; the first that fails ends the rest.

    Raises:
        MediaError: as `qvl.media.aload`.
        RequestError: a limit of a picture is above what `policy` allows.
    """
    from qvl.media import gate

    if not pictures:
        return []
    policies = _policies(policy, pictures)
    fetching = asyncio.Semaphore(MAX_FETCHES)

    async def load(source: PictureSource, own: MediaPolicy) -> Picture:
        async with fetching if gate.is_remote(source) else contextlib.nullcontext():
            return await gate.aload(source, own, decode=False, seen=seen)

    return await _together(
        [
            _numbered(number, load(picture.source, own))
            for number, (picture, own) in enumerate(zip(pictures, policies, strict=True))
        ]
    )


def read_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, seen: DigestCache, *, may_wait: bool
) -> list[Picture] | None:
    """Return the pictures, read and hashed in this thread; None where `load_pictures` does better.

    Small ones in memory are read here in any case, since changing threads takes longer, and one that `is_one_local`
    if it `may_wait`; several are read and hashed side by side elsewhere.

    Raises:
        MediaError: as `load_pictures`.
    """
    from qvl.media import gate

    ready: list[Picture] = []
    alone = may_wait and is_one_local(pictures)
    for number, (picture, own) in enumerate(zip(pictures, _policies(policy, pictures), strict=True)):
        with naming(number):
            if alone:
                ready.append(gate.load(picture.source, own, decode=False, seen=seen))
            elif (now := gate.load_now(picture.source, own, seen=seen)) is not None:
                ready.append(now)
            else:
                return None
    return ready


def is_one_local(pictures: Sequence[UnreadPicture]) -> bool:
    """Return True for a single picture that need not be fetched."""
    from qvl.media import gate

    return len(pictures) == 1 and not gate.is_remote(pictures[0].source)


async def decode_pictures(request: ChatRequest, *, pixels: bool) -> ChatRequest:
    """Return the request, its pictures within its own pixel budget and decoded, or (without `pixels`) checked.

    Raises:
        MediaError: a picture is cut short or broken.
    """
    from qvl.media import gate

    pictures = request.pictures
    if not pictures:
        return request
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
    return request.replace(
        messages=tuple(
            dataclasses.replace(
                message, parts=tuple(map_parts(message.parts, _same, lambda media: ImagePart(next(coming))))
            )
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
    """Put the picture's number into its error."""
    try:
        yield
    except MediaError as exc:
        exc.picture = number
        raise


async def _numbered(number: int, work: Coroutine[object, object, T]) -> T:
    """Return what `work` on the picture of this number does; its error then names it."""
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
