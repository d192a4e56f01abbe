"""The media gate's way for videos: any source becomes one checked Video."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final

from qvl.errors import MediaError
from qvl.media.decode_threads import in_worker
from qvl.media.policy import DEFAULT_POLICY, MediaPolicy
from qvl.media.video import Video
from qvl.media.video_sampling import DEFAULT_SAMPLING, VideoSampling

if TYPE_CHECKING:
    from qvl.media.fetch import Resolver
    from qvl.media.picture import PictureSource


# What is said of pictures where sources are read: whole messages, since in others a name may have such words.
_OF_PICTURES: Final = re.compile(
    r"(paths are not accepted for |the path or URL of a |a (?:\w+|data: URL of .*) is not a )picture(s here| is empty|)"
)


def load_video(
    source: PictureSource | Video, policy: MediaPolicy = DEFAULT_POLICY, sampling: VideoSampling = DEFAULT_SAMPLING
) -> Video:
    """Return `source` as a checked Video, whose frames are decoded on first use; a URL needs `aload_video`.

    Args:
        source: a path, a `file:` or `data:` URL, encoded bytes, a binary file object, or a Video.
        policy: the limits.
        sampling: which frames are shown.

    Raises:
        MediaError: the video is missing, broken, refused, has no pictures, or breaks a limit.
        MissingDependencyError: PyAV is not installed.
    """
    if isinstance(source, Video):
        return source
    from qvl.media import sources
    from qvl.media.video_file import read_video

    with _told_as_video(policy):
        data, name = sources.read(source, _of_videos(policy))
    return read_video(data, name, policy, sampling)


async def aload_video(
    source: PictureSource | Video,
    policy: MediaPolicy = DEFAULT_POLICY,
    sampling: VideoSampling = DEFAULT_SAMPLING,
    *,
    resolver: Resolver | None = None,
) -> Video:
    """Return `source` as `load_video` does, for async code; http(s) URLs are fetched as pictures are."""
    from qvl.media import gate

    if not gate.is_remote(source):  # type: ignore[arg-type]
        return await in_worker(lambda: load_video(source, policy, sampling), large=True)
    from qvl.media.fetch import Fetcher, public_name
    from qvl.media.video_file import read_video

    url = str(source).strip()
    fetcher = Fetcher(_of_videos(policy)) if resolver is None else Fetcher(_of_videos(policy), resolver=resolver)
    with _told_as_video(policy):
        data = await fetcher.fetch(url)
    return await in_worker(lambda: read_video(data, public_name(url), policy, sampling), large=True)


async def decode_video(video: Video) -> None:
    """Decode the frames of `video` together, so that each is at hand once.

    Raises:
        MediaError: the video is broken, or takes too long.
    """
    await in_worker(lambda: video.frames[0].decoded(), large=True)


def _of_videos(policy: MediaPolicy) -> MediaPolicy:
    return dataclasses.replace(policy, max_bytes=policy.max_video_bytes)


class _told_as_video:  # noqa: N801 - used as a context
    """Has the errors of reading speak of videos."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._policy = policy

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if not isinstance(exc, MediaError):
            return
        if exc.code == "image_too_large":
            hint = "cut it or encode it smaller first"
            raise MediaError(exc.message, hint=hint, code="video_too_large") from exc
        if told := _OF_PICTURES.fullmatch(exc.message):
            way_out = (exc.hint or "").replace("image/", "video/")
            raise MediaError(f"{told[1]}video{told[2]}", hint=way_out, code=exc.code) from exc
