"""Loads and decodes the pictures of a request, several at a time, each fault with its place."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qvl.errors import MediaError
from qvl.media.smart_resize import NO_LIMITS
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import (
    ChatRequest,
    ImagePart,
)

if TYPE_CHECKING:
    from qvl.media.digest_cache import DigestCache
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy

T = TypeVar("T")

# Of one request at a time: what they bring waits in memory.
MAX_FETCHES: Final = 8


async def load_pictures(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, *, seen: DigestCache | None = None
) -> list[Picture]:
    """Reads and hashes pictures at once, in order, without decoding them; the first that fails ends the rest.

    Raises:
        MediaError: as `qvl.gate.aload`.
        RequestError: a picture is wanted larger than `policy` allows.
    """
    from qvl.media import gate

    if not pictures:
        return []
    policies = _policies(policy, pictures)
    fetching = asyncio.Semaphore(MAX_FETCHES)

    async def load(source: Any, own: MediaPolicy) -> Picture:
        async with fetching if gate.is_remote(source) else contextlib.nullcontext():
            return await gate.aload(source, own, decode=False, seen=seen)

    return await _together(
        [
            _numbered(number, load(picture.source, own))
            for number, (picture, own) in enumerate(zip(pictures, policies, strict=True))
        ]
    )


def load_picture_here(
    pictures: Sequence[UnreadPicture], policy: MediaPolicy, seen: DigestCache
) -> list[Picture] | None:
    """As `load_pictures`, in this thread, for at most one picture; None where others would do better.

    Changing threads for one takes longer than what is done there, while several are read and hashed side by side, and
    one from the web is waited for.
    """
    from qvl.media import gate

    if len(pictures) > 1 or any(gate.is_remote(picture.source) for picture in pictures):
        return None
    with _naming(0):
        return [
            gate.load(picture.source, own, decode=False, seen=seen)
            for picture, own in zip(pictures, _policies(policy, pictures), strict=True)
        ]


async def ready_pictures(request: ChatRequest, *, pixels: bool) -> ChatRequest:
    """The request with every picture within the request's own pixel budget, and decoded, or checked without `pixels`.

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


def check_pictures_here(request: ChatRequest) -> ChatRequest:
    """As `ready_pictures` without pixels, in this thread."""
    from qvl.media import gate

    ready = []
    for number, picture in enumerate(request.pictures):
        with _naming(number):
            ready.append(gate.ready(picture, request.max_pixels, pixels=False))
    return _with_pictures(request, request.pictures, ready)


def _with_pictures(request: ChatRequest, before: Sequence[Picture], after: Sequence[Picture]) -> ChatRequest:
    if all(one is other for one, other in zip(before, after, strict=True)):
        return request
    coming = iter(after)
    return request.replace(
        messages=tuple(
            dataclasses.replace(
                message,
                parts=tuple([ImagePart(next(coming)) if isinstance(p, ImagePart) else p for p in message.parts]),
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
def _naming(number: int) -> Iterator[None]:
    """A picture's error says which one it was."""
    try:
        yield
    except MediaError as exc:
        exc.picture = number
        raise


async def _numbered(number: int, work: Coroutine[Any, Any, T]) -> T:
    """`work` on the picture of this number, which its error then names."""
    with _naming(number):
        return await work


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; when one fails, the rest are cancelled and waited for before the error goes on."""
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
