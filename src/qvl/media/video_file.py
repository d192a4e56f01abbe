"""Reads videos: finds the times of their frames without decoding, and decodes those that are shown. PyAV."""

from __future__ import annotations

import bisect
import hashlib
import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.errors import MediaError, MissingDependencyError
from qvl.media.policy import canonical_size
from qvl.media.video import FrameStore, Video
from qvl.media.video_head import HEAD, container_of, is_sound

if TYPE_CHECKING:
    from collections.abc import Iterator

    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL import Image

    from qvl.media.policy import MediaPolicy
    from qvl.media.video_sampling import VideoSampling

# Frames that are looked at before a file is refused, beyond any that a video of the longest time has.
_MAX_PACKETS: Final = 2_000_000
_HINT: Final = "cut it with ffmpeg, or set video_start and video_end"


@dataclass(frozen=True, slots=True)
class _Index:
    """The frames of a video, by their packets: `pts` sorted, in `tick` seconds; None where a file has none.

    `keys` are the pts at which decoding can begin.
    """

    pts: list[int] | None
    times: list[float]
    keys: list[int]
    rate: float
    duration: float


def read_video(data: bytes, name: str, policy: MediaPolicy, sampling: VideoSampling) -> Video:
    """Return the video of encoded `data`: its frames are chosen, the first of them is decoded.

    Raises:
        MediaError: it is no video, broken, has no frames, or breaks a limit.
        MissingDependencyError: PyAV is not installed.
    """
    kind = container_of(data[:HEAD])
    if kind is None:
        what = "has sound alone, no pictures" if is_sound(data[:HEAD]) else "is not a video"
        raise MediaError(f"{name} {what}", hint="MP4, MOV, MKV, WebM, AVI, MPEG-TS, FLV, Ogg or WMV", code=_CODE)
    _library()
    index = _indexed(data, kind, name, policy)
    span = _span(index, sampling)
    if span > policy.max_video_seconds:
        raise MediaError(
            f"{name}: {_spoken(span)} of video, the limit is {_spoken(policy.max_video_seconds)}",
            hint=_HINT,
            code="video_too_long",
        )
    chosen = sampling.choose(index.times, index.rate, policy.max_video_frames, name)
    first = _decoded(data, kind, name, index, [chosen[0]], policy, None)[0]
    original = first.size
    size = frame_size(original, len(chosen), policy)
    store = FrameStore(lambda: _decoded(data, kind, name, index, chosen, policy, size))
    digest = hashlib.sha256(data).hexdigest()
    frames = tuple(
        store.picture(
            number,
            "sha256:" + hashlib.sha256(f"{digest}/{at}".encode()).hexdigest(),
            size,
            original,
            f"{name} at {index.times[at]:.2f} s",
        )
        for number, at in enumerate(chosen)
    )
    times = tuple(round(index.times[at], 6) for at in chosen)
    note = sampling.note_on(index.times, index.rate, len(chosen))
    return Video(f"sha256:{digest}", frames, times, index.duration, index.rate, name, data, note)


_CODE: Final = "video_unreadable"


def _library() -> None:
    try:
        import av  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError("videos need PyAV", hint="pip install 'qvl[video]'") from exc


def frame_size(original: tuple[int, int], count: int, policy: MediaPolicy) -> tuple[int, int]:
    """Return (width, height) of each of `count` frames within the policy's limits of a picture and of a video."""
    import dataclasses

    share = max(32 * 32, policy.max_video_pixels // count)
    if share < policy.max_pixels:
        policy = dataclasses.replace(policy, max_pixels=share, min_pixels=min(policy.min_pixels, share))
    return canonical_size(*original, policy)[:2]


def _span(index: _Index, sampling: VideoSampling) -> float:
    """Return the seconds that are looked at: of the whole video, or of the part that `sampling` names.

    Frames that are named one by one are no part, however far apart they are.
    """
    if sampling.timestamps:
        return 0.0
    end = index.duration if sampling.video_end is None else min(sampling.video_end, index.duration)
    return max(0.0, end - (sampling.video_start or 0.0))


def _spoken(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    told = [f"{count} {unit}" for count, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if count]
    return " ".join(told) or "0 s"


class _Opened:
    """An open container and its first stream of pictures, as a context; FFmpeg's errors become MediaErrors."""

    def __init__(self, data: bytes, kind: str, name: str) -> None:
        self._data, self._kind, self._name = data, kind, name
        self.container: InputContainer

    def __enter__(self) -> tuple[InputContainer, VideoStream]:
        import av

        try:
            self.container = av.open(io.BytesIO(self._data), "r", format=self._kind, metadata_errors="ignore")
        except av.error.EOFError as exc:
            raise _frameless(self._name) from exc
        except (av.error.FFmpegError, ValueError, OSError) as exc:
            raise _broken(self._name, exc) from exc
        try:
            return self.container, self._stream()
        except BaseException:
            self.container.close()
            raise

    def _stream(self) -> VideoStream:
        import av

        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if streams:
            stream = streams[0]
            if stream.codec_context is None:
                raise MediaError(f"{self._name}: its codec is unknown here", hint="convert it to H.264", code=_CODE)
            return stream
        what = "has sound alone, no pictures" if self.container.streams.audio else "has no video stream"
        raise MediaError(f"{self._name} {what}", hint="send a file with a video stream", code=_CODE)

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        import av

        self.container.close()
        if isinstance(exc, av.error.FFmpegError | ValueError | OSError) and not isinstance(exc, MediaError):
            raise _broken(self._name, exc) from exc


def _frameless(name: str) -> MediaError:
    return MediaError(f"{name} has no frames", hint="check that it plays, and that it is whole", code=_CODE)


def _broken(name: str, exc: Exception) -> MediaError:
    reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return MediaError(f"{name} is broken: {reason}", hint="check that it plays, and that it is whole", code=_CODE)


def _indexed(data: bytes, kind: str, name: str, policy: MediaPolicy) -> _Index:
    """Return the times of all frames, from the packets alone."""
    deadline = time.monotonic() + policy.max_video_decode_seconds
    pts: list[int] = []
    keys: list[int] = []
    count, unknown, lengths = 0, False, 0
    with _Opened(data, kind, name) as (container, stream):
        if stream.width * stream.height > policy.max_source_pixels:
            what = f"{name}: frames of {stream.width}x{stream.height} pixels, above {policy.max_source_pixels}"
            raise MediaError(what, hint="make it smaller first", code="video_too_large")
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            count += 1
            lengths += packet.duration or 0
            if packet.pts is None:
                unknown = True
            else:
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
            if count > _MAX_PACKETS or time.monotonic() > deadline:
                raise MediaError(f"{name} takes too long to read", hint=_HINT, code="video_too_long")
        tick = float(stream.time_base or 0)
        told = float(stream.average_rate or stream.guessed_rate or 0)
    if not count:
        raise _frameless(name)
    if unknown or not tick:
        rate = told or 25.0
        return _Index(None, [number / rate for number in range(count)], [], rate, count / rate)
    # Fields of one frame, and packets that a container repeats, have one time.
    pts = sorted(set(pts))
    times = [(at - pts[0]) * tick for at in pts]
    mean = times[-1] / (len(pts) - 1) if len(pts) > 1 else lengths / count * tick
    measured = 1 / mean if mean > 0 else told or 25.0
    rate = told if told and abs(told - measured) <= 0.01 * told else measured
    steady = all(abs(at - number / rate) <= 0.0011 + tick for number, at in enumerate(times))
    if steady:
        # What the container's clock rounded: every container of a constant rate tells the same times.
        times = [number / rate for number in range(len(pts))]
    return _Index(pts, times, sorted(keys), rate, times[-1] + 1 / rate)


def _decoded(
    data: bytes,
    kind: str,
    name: str,
    index: _Index,
    chosen: list[int],
    policy: MediaPolicy,
    size: tuple[int, int] | None,
) -> list[Image.Image]:
    """Return the frames at the indices `chosen`, upright, in mode RGB, resized to `size`."""
    deadline = time.monotonic() + policy.max_video_decode_seconds
    wanted = sorted(set(chosen))
    found: dict[int, Image.Image] = {}
    for seeks in (True, False) if index.pts is not None else (False,):
        with _Opened(data, kind, name) as (container, stream):
            stream.thread_type = "AUTO"
            frames = _seeking(container, stream, index, wanted) if seeks else _in_turn(container, stream, index)
            for number, frame in frames:
                if time.monotonic() > deadline:
                    limit = f"{policy.max_video_decode_seconds:g} s"
                    raise MediaError(f"{name} takes longer than {limit} to decode", hint=_HINT, code="video_too_long")
                if number in found or number not in wanted:
                    continue
                found[number] = _upright(frame, size, policy, name)
                if len(found) == len(wanted):
                    return [found[at] if at == before else found[at].copy() for before, at in _pairs(chosen)]
    missing = next(at for at in wanted if at not in found)
    what = f"{name} is broken: its frame at {index.times[missing]:.2f} s cannot be decoded"
    raise MediaError(what, hint="check that it plays, and that it is whole", code=_CODE)


def _pairs(chosen: list[int]) -> list[tuple[int, int]]:
    """Return (index or -1 where it was there before, index) of each."""
    seen: set[int] = set()
    pairs = []
    for at in chosen:
        pairs.append((-1 if at in seen else at, at))
        seen.add(at)
    return pairs


def _in_turn(container: InputContainer, stream: VideoStream, index: _Index) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield every frame with its index, from the beginning."""
    places = {} if index.pts is None else {at: number for number, at in enumerate(index.pts)}
    for number, frame in enumerate(container.decode(stream)):
        place = number if index.pts is None else places.get(frame.pts or 0)
        if place is not None:
            yield place, frame


def _seeking(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield every frame that is decoded, with its index (-1 of one that is not wanted).

    It jumps to the key frame before the next one wanted, and may miss some.
    """
    assert index.pts is not None
    places = {at: number for number, at in enumerate(index.pts)}
    targets = [index.pts[number] for number in wanted]
    done, here, sought = 0, None, None
    while done < len(targets):
        key = _key_before(index.keys, targets[done])
        if key is not None and (sought is None or key > sought):
            container.seek(key, stream=stream)
            sought = key
        elif here is not None:
            return
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            here = frame.pts
            while done < len(targets) and targets[done] < here:
                done += 1
            if done < len(targets) and targets[done] == here:
                yield places[here], frame
                done += 1
            else:
                yield -1, frame
            if done == len(targets):
                return
            ahead = _key_before(index.keys, targets[done])
            # What a broken or sparse index leads back from is not sought again, but decoded through.
            if ahead is not None and ahead > here and (sought is None or ahead > sought):
                break
        else:
            return


def _key_before(keys: list[int], at: int) -> int | None:
    place = bisect.bisect_right(keys, at)
    return keys[place - 1] if place else None


def _upright(frame: av.VideoFrame, size: tuple[int, int] | None, policy: MediaPolicy, name: str) -> Image.Image:
    from PIL import Image

    from qvl.media import pixels

    if frame.width * frame.height > policy.max_source_pixels:
        what = f"{name}: a frame of {frame.width}x{frame.height} pixels, above {policy.max_source_pixels}"
        raise MediaError(what, hint="make it smaller first", code="video_too_large")
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    if turns:
        way = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        image = image.transpose(way[turns - 1])
    return image if size is None or image.size == size else pixels.resized(image, size)
