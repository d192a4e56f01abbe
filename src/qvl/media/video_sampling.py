"""Which frames of a video are shown to a model: the one rule for every backend, that of Qwen3-VL's processor."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from qvl.errors import ConfigError, MediaError, QvlError, RequestError

# Qwen3-VL's defaults, of its processor and of qwen-vl-utils.
FPS: Final = 2.0
MIN_FRAMES: Final = 4
MAX_FRAMES: Final = 768
# The names of a part's fields, Qwen's; `timestamps` are seconds.
VIDEO_FIELDS: Final = ("fps", "nframes", "timestamps", "video_start", "video_end", "min_frames", "max_frames")
# Gaps between the frames of a constant rate, in seconds, as containers round them.
JITTER: Final = 0.0021
LARGEST: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class VideoSampling:
    """The choice of frames: `fps` of them a second, `nframes` spread evenly, or those shown at `timestamps`.

    Args:
        fps: frames a second; 2 unless something else is given.
        nframes: their number, evenly spread; all of a video that has fewer.
        timestamps: seconds from the video's first frame.
        video_start: seconds at which the part that is looked at begins.
        video_end: seconds at which it ends.
        min_frames: least number by `fps`, as far as there are so many; 4 by default.
        max_frames: largest number by `fps`; 768 by default.
        where: path of the request field, for errors.

    Raises:
        ConfigError: values that exclude each other; RequestError, if they stand in a request (`where`).
    """

    fps: float | None = None
    nframes: int | None = None
    timestamps: tuple[float, ...] = ()
    video_start: float | None = None
    video_end: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        ways = [name for name in ("fps", "nframes", "timestamps") if getattr(self, name) not in (None, ())]
        if len(ways) > 1:
            raise _refused(self.where, ways[1], f"stands beside {ways[0]}", "choose frames in one way")
        if self.video_start is not None and self.video_end is not None and self.video_start >= self.video_end:
            raise _refused(self.where, "video_end", "is not behind video_start", "both in seconds")
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise _refused(self.where, "min_frames", "is above max_frames", None)

    def over(self, general: VideoSampling) -> VideoSampling:
        """Return this sampling, with what it leaves open taken from `general`."""
        if general == DEFAULT_SAMPLING or self == DEFAULT_SAMPLING:
            return general if self == DEFAULT_SAMPLING else self
        chosen = self.fps is not None or self.nframes is not None or self.timestamps
        names = ("video_start", "video_end", "min_frames", "max_frames")
        mixed = {name: getattr(general, name) for name in names if getattr(self, name) is None}
        if not chosen:
            mixed |= {"fps": general.fps, "nframes": general.nframes, "timestamps": general.timestamps}
        return replace(self, **mixed)

    def choose(self, times: Sequence[float], rate: float, most: int, name: str) -> list[int]:
        """Return the indices of the frames that are shown, in order; there is at least one.

        Args:
            times: seconds of every frame from the first, sorted.
            rate: frames a second on average.
            most: largest number of frames that the media gate allows.
            name: the video's, for errors.

        Raises:
            MediaError: no frame lies in the part, or more would be shown than allowed.
        """
        first, last = self._part(times)
        if first >= last:
            span = f"{self.video_start or 0:g} s and {times[-1] if self.video_end is None else self.video_end:g} s"
            raise MediaError(f"{name}: no frame between {span}", hint=f"its last one is at {times[-1]:.2f} s")
        if self.timestamps:
            return self._at_times(times, most, name)
        total = last - first
        count = self._count(total, rate, most, name)
        if _is_steady(times[first:last]):
            return [first + index for index in _spread(0, total - 1, count)]
        begin, end = times[first], times[last - 1]
        step = (end - begin) / max(1, count - 1)
        return sorted({_nearest(times, begin + number * step, first, last) for number in range(count)})

    def note_on(self, times: Sequence[float], rate: float, shown: int) -> str:
        """Return what is said where `shown` frames are fewer than were asked for, "" where they are not.

        Args:
            times: seconds of every frame, sorted.
            rate: frames a second on average.
            shown: how many are shown.
        """
        first, last = self._part(times)
        whole = ", all that there are" if shown == last - first else ""
        if self.nframes is not None and shown < self.nframes:
            return f"{shown} frames are shown instead of {self.nframes}{whole}"
        wanted = 0 if self.fps is None else int((last - first) / rate * self.fps)
        if shown < min(wanted, LARGEST if self.max_frames is None else self.max_frames):
            return f"{shown} frames are shown instead of the {wanted} of fps={self.fps:g}{whole}"
        return ""

    def _part(self, times: Sequence[float]) -> tuple[int, int]:
        """Return (index of the first frame of the part that is looked at, index behind its last one)."""
        first = 0 if self.video_start is None else bisect.bisect_left(times, self.video_start - 1e-6)
        last = len(times) if self.video_end is None else bisect.bisect_right(times, self.video_end + 1e-6)
        return first, last

    def _count(self, total: int, rate: float, most: int, name: str) -> int:
        if self.nframes is not None:
            if min(self.nframes, total) > most:
                raise MediaError(f"{name}: nframes={self.nframes} is above the limit of {most}", hint="fewer frames")
            return min(self.nframes, total)
        wanted = int(total / rate * (self.fps or FPS))
        least = MIN_FRAMES if self.min_frames is None else self.min_frames
        largest = MAX_FRAMES if self.max_frames is None else self.max_frames
        return max(1, min(max(wanted, least), largest, most, total))

    def _at_times(self, times: Sequence[float], most: int, name: str) -> list[int]:
        if len(self.timestamps) > most:
            raise MediaError(f"{name}: {len(self.timestamps)} timestamps, above the limit of {most}", hint="fewer")
        gap = (times[-1] - times[0]) / max(1, len(times) - 1)
        late = next((at for at in self.timestamps if at > times[-1] + gap + JITTER), None)
        if late is not None:
            raise MediaError(f"{name}: no frame at {late:g} s", hint=f"its last one is at {times[-1]:.2f} s")
        # The frame that a player shows at that time.
        return [max(0, bisect.bisect_right(times, at + JITTER / 2) - 1) for at in sorted(self.timestamps)]


DEFAULT_SAMPLING: Final = VideoSampling()


def read_sampling(fields: Mapping[str, object], where: str = "") -> VideoSampling:
    """Return the sampling among `fields`; `where` is their path in the request, "" for arguments.

    Raises:
        RequestError: an invalid value (ConfigError if it is an argument).
    """
    given = {name: fields[name] for name in VIDEO_FIELDS if fields.get(name) is not None}
    if fields.get("num_frames") is not None:
        if "nframes" in given:
            raise _refused(where, "num_frames", "stands beside nframes", "use one of them")
        given["nframes"] = fields["num_frames"]
    if not given:
        return DEFAULT_SAMPLING
    read: dict[str, object] = {}
    for name, value in given.items():
        if name == "timestamps":
            listed = list(value) if isinstance(value, list | tuple) else []
            if not listed:
                raise _refused(where, name, "is not a list of seconds", "[0.5, 2, 3.5]")
            read[name] = tuple(_number(where, name, item, least=0.0) for item in listed)
        elif name in ("nframes", "min_frames", "max_frames"):
            called = "num_frames" if name == "nframes" and fields.get("num_frames") is not None else name
            number = _number(where, called, value, least=1.0)
            if number != int(number):
                raise _refused(where, called, "is not a whole number", None)
            read[name] = int(number)
        else:
            number = _number(where, name, value, least=0.0)
            if name == "fps" and not number:
                raise _refused(where, name, "is not above 0", None)
            read[name] = number
    return VideoSampling(**read, where=where)  # type: ignore[arg-type]


def _number(where: str, name: str, value: object, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(where, name, f"is {str(value)[:40]!r}, not a number", None)
    if not least <= value <= LARGEST:
        raise _refused(where, name, f"is {value:g}", f"from {least:g} to {LARGEST}")
    return float(value)


def _refused(where: str, name: str, fault: str, hint: str | None) -> QvlError:
    if not where:
        return ConfigError(f"{name} {fault}", hint=hint, param=name)
    param = f"{where}.{name}"
    return RequestError(f"{param} {fault}", hint=hint, param=param, code="invalid_value")


def _is_steady(times: Sequence[float]) -> bool:
    """True if the gaps between frames are equal, but for the rounding of a container's clock."""
    if len(times) < 3:
        return True
    mean = (times[-1] - times[0]) / (len(times) - 1)
    return all(abs(after - before - mean) <= JITTER for before, after in pairwise(times))


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return `count` whole numbers from first to last, evenly spread: numpy's linspace, rounded."""
    import numpy as np

    return [int(index) for index in np.linspace(first, last, count).round()]


def _nearest(times: Sequence[float], at: float, first: int, last: int) -> int:
    index = bisect.bisect_left(times, at, first, last)
    if index == last or (index > first and at - times[index - 1] <= times[index] - at):
        return index - 1
    return index
