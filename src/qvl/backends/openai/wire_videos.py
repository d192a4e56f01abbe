"""Videos in the body of a request, in the two forms that let an endpoint show our frames at our times.

`file`: the file itself and the times of its frames, as qvl-serve takes it. `frames`: the encoded frames one behind
another, with their times in a field of the request, as vLLM takes it where it lets requests say how media are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from qvl.errors import UnsupportedInputError
from qvl.media import base64_codec
from qvl.media.policy import DEFAULT_POLICY
from qvl.media.smart_resize import LEAST_RESIZED, budget
from qvl.media.video_head import HEAD, container_of
from qvl.types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from qvl.media.video import Video

VideoForm: TypeAlias = Literal["file", "frames"]
FORMS: Final[tuple[VideoForm, ...]] = ("file", "frames")
# Of vLLM's numbers of frames, which are whole: their times are told in milliseconds.
TICKS: Final = 1000


def form_named(name: str) -> VideoForm | None:
    """Return the form of this name; None for "", that of an endpoint that takes no videos."""
    return next((form for form in FORMS if form == name), None)


def part_fields(video: Video, form: VideoForm, max_pixels: int | None) -> JsonObject:
    """Return the fields of a video's part beside its URL."""
    if form == "frames":
        return {}
    fields: JsonObject = {"timestamps": list(video.times)}
    if size := _own_size(video, max_pixels):
        if size[0] * size[1] < LEAST_RESIZED:
            # So small a size cannot be asked for, but a limit can.
            fields["max_pixels"] = size[0] * size[1]
        else:
            fields["resized_width"], fields["resized_height"] = size
    return fields


def request_fields(videos: Sequence[Video], form: VideoForm | None, extra: JsonMapping) -> JsonObject:
    """Return the fields of a request that say how its videos are read, with what `extra` says there of pictures.

    Raises:
        UnsupportedInputError: `extra` says it of videos.
    """
    if not videos:
        return {}
    told = extra.get("media_io_kwargs") or {}
    if not isinstance(told, Mapping) or "video" in told:
        what = "media_io_kwargs.video cannot be set beside a video, whose frames are chosen already"
        raise UnsupportedInputError(what, hint="leave it out", param="media_io_kwargs.video")
    if form != "frames":
        return {}
    (video,) = videos
    return {"media_io_kwargs": {**told, "video": frames_at([round(at * TICKS) for at in video.times])}}


def frames_at(ticks: Sequence[int]) -> JsonObject:
    """Return what vLLM is told of frames at these times, in thousandths of a second."""
    known = {"num_frames": -1, "fps": TICKS, "total_num_frames": max(len(ticks), ticks[-1] + 1)}
    return {**known, "frames_indices": list(ticks), "do_sample_frames": False}


def url_pieces(video: Video, form: VideoForm, max_pixels: int | None) -> Iterator[bytes | memoryview]:
    """Yield a video's `data:` URL, in pieces.

    Raises:
        MediaError: the video is broken, or takes too long to decode.
    """
    if form == "file":
        kind = container_of(video.data[:HEAD])
        yield f"data:video/{'mp4' if kind == 'mov' else kind};base64,".encode()
        yield base64_codec.encoded(video.data)
        return
    yield b"data:video/jpeg;base64,"
    for number, frame in enumerate(video.frames):
        yield b"," if number else b""
        yield (frame if max_pixels is None else frame.fit(max_pixels)).base64()


def _own_size(video: Video, max_pixels: int | None) -> tuple[int, int] | None:
    """Return (width, height) of the frames where an endpoint would not give them that size by itself."""
    from qvl.media.video_file import frame_size

    frame = video.frames[0]
    size = frame.width, frame.height
    if max_pixels is not None:
        size = budget(*size, max_pixels)
    by_itself = frame_size(frame.original, len(video.frames), DEFAULT_POLICY)
    return size if frame.sized or size != by_itself else None
