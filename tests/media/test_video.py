"""Videos pass the gate: the same frames in every container, chosen as Qwen3-VL's processor does, and clear refusals."""

from __future__ import annotations

import dataclasses
import itertools
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import av
import numpy as np
import pytest
from PIL import Image
from tests.media.films import FORMS, bar, film, sound_alone, turned, without_frames

from qvl.errors import ConfigError, MediaError, RequestError
from qvl.media import video_file
from qvl.media.load_video import aload_video, load_video
from qvl.media.policy import MediaPolicy
from qvl.media.video_head import looks_like_video
from qvl.media.video_sampling import VideoSampling, read_sampling


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {ending: film(folder / f"clip.{ending}") for ending in FORMS}


def test_every_container_gives_the_same_frames_at_the_same_times(films: dict[str, Path]) -> None:
    shown = {}
    for ending, path in films.items():
        video = load_video(path)
        shown[ending] = (video.times, [round(bar(frame.rgb()) / 6.4) for frame in video.frames])
        assert video.fps == pytest.approx(10)
        assert video.duration == pytest.approx(2)
    assert len(set(map(str, shown.values()))) == 1, shown
    times, bars = shown["mp4"]
    # What is seen at a time is the frame of that time: its bar is (10 t + 1) / 20 of the width.
    assert bars == [round(10 * at + 1) for at in times]


@pytest.mark.parametrize(("frames", "fps", "wanted"), [(20, 10, 2.0), (95, 30, 1.0), (7, 25, 2.0), (300, 24, 4.0)])
def test_frames_are_chosen_as_transformers_chooses_them(frames: int, fps: int, wanted: float) -> None:
    module = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    rules = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=frames, fps=fps)
    theirs = module.Qwen3VLVideoProcessor.sample_frames(rules, metadata, fps=wanted)
    ours = VideoSampling(fps=wanted).choose([number / fps for number in range(frames)], fps, 768, "a")
    assert ours == theirs.tolist()
    number = VideoSampling(nframes=5).choose([number / fps for number in range(frames)], fps, 768, "a")
    assert number == module.Qwen3VLVideoProcessor.sample_frames(rules, metadata, num_frames=5).tolist()


def test_a_part_a_number_and_times_are_honoured(films: dict[str, Path]) -> None:
    part = load_video(films["mkv"], sampling=VideoSampling(nframes=3, video_start=0.5, video_end=1.5))
    assert part.times == (0.5, 1.0, 1.5)
    named = load_video(films["mkv"], sampling=VideoSampling(timestamps=(1.94, 0.0, 0.55)))
    assert named.times == (0.0, 0.5, 1.9)
    assert [round(bar(frame.rgb()) / 6.4) for frame in named.frames] == [1, 6, 20]
    again = [bar(frame.rgb()) for frame in named.frames]
    assert again == [bar(frame.rgb()) for frame in named.frames], "a frame can be had twice"


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    path = film(tmp_path / "phone.mkv", frames=20, gaps=(5, 5, 5, 45))
    video = load_video(path, sampling=VideoSampling(fps=2))
    assert video.duration == pytest.approx(3.0, abs=0.5)
    steps = [after - before for before, after in zip(video.times, video.times[1:], strict=False)]
    assert max(steps) < 0.9, video.times
    # Frame n lies at 0.6 (n // 4) + 0.05 (n % 4): what is seen is the frame of the time that is told.
    for at, frame in zip(video.times, video.frames, strict=True):
        number = round(bar(frame.rgb()) / 6.4) - 1
        assert at == pytest.approx(0.6 * (number // 4) + 0.05 * (number % 4), abs=0.011)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_phone_held_otherwise_is_shown_upright(tmp_path: Path, quarters: int) -> None:
    data = film(tmp_path / "phone.mp4", frames=4).read_bytes()
    shown = load_video(turned(data, quarters))
    assert (shown.width, shown.height) == ((96, 128) if quarters % 2 else (128, 96))
    way = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}[quarters]
    # A quarter turn clockwise: the bar of the upper half is at the right.
    assert _far(shown.frames[-1].rgb(), load_video(data).frames[-1].rgb().transpose(way)) < 3


def _far(one: Image.Image, other: Image.Image) -> float:
    pairs = list(zip(one.tobytes(), other.tobytes(), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_what_is_no_video_is_refused_in_one_line(films: dict[str, Path], tmp_path: Path) -> None:
    clip = films["mp4"].read_bytes()
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"hello, no video here")
    (tmp_path / "wave.mp4").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    sound_alone(tmp_path / "song.mp4")
    without_frames(tmp_path / "none.mp4")
    without_frames(tmp_path / "none.mkv")
    (tmp_path / "mangled.webm").write_bytes(films["webm"].read_bytes()[:40] + bytes(2000))
    told = {
        "none.mkv": "has no frames",
        "none.avi": "no such file",
        "mangled.webm": "is broken|has no frames",
        "cut.mp4": "is broken",
        "empty.mp4": "is not a video",
        "text.mp4": "is not a video",
        "wave.mp4": "has sound alone",
        "song.mp4": "has sound alone, no pictures",
        "none.mp4": "has no video stream",
    }
    for name, words in told.items():
        with pytest.raises(MediaError, match=words) as caught:
            load_video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_limits_are_told_with_the_way_out(films: dict[str, Path]) -> None:
    path = films["mp4"]
    for policy, words in (
        (MediaPolicy(max_video_seconds=1), "2 s of video, the limit is 1 s"),
        (MediaPolicy(max_video_bytes=100), "more than the limit of 100 bytes"),
        (MediaPolicy(max_source_pixels=5000), "128x96 pixels, above 5000"),
    ):
        with pytest.raises(MediaError, match=re.escape(words)):
            load_video(path, policy)
    part = load_video(path, MediaPolicy(max_video_seconds=1), VideoSampling(video_start=0.2, video_end=1))
    assert part.times[0] == 0.2
    assert part.times[-1] == 1.0
    few = load_video(path, MediaPolicy(max_video_frames=2), VideoSampling(fps=10))
    assert len(few.frames) == 2
    with pytest.raises(MediaError, match="nframes=9 is above the limit of 2"):
        load_video(path, MediaPolicy(max_video_frames=2), VideoSampling(nframes=9))
    small = load_video(path, MediaPolicy(max_video_pixels=4 * 64 * 48))
    assert small.frames[0].rgb().size == (small.width, small.height) == (64, 48)
    with pytest.raises(MediaError, match=r"no frame between 5 s and 1\.9 s"):
        load_video(path, sampling=VideoSampling(video_start=5))


def test_a_film_of_ten_hours_is_refused_and_a_part_of_it_shown(tmp_path: Path) -> None:
    path = film(tmp_path / "long.mkv", frames=11, gaps=(360_000,))
    with pytest.raises(MediaError, match=r"long\.mkv: 1\d h.* of video, the limit is 1 h") as caught:
        load_video(path)
    assert "video_start and video_end" in (caught.value.hint or "")
    part = load_video(path, sampling=VideoSampling(video_start=7100, video_end=10_700))
    assert part.times == (7200,)
    assert round(bar(part.frames[0].rgb()) * 11 / 128) == 3
    two = load_video(path, sampling=VideoSampling(timestamps=(3600, 7200)))
    assert two.times == (3600, 7200)


def test_frames_that_are_named_may_lie_far_apart(films: dict[str, Path]) -> None:
    short = MediaPolicy(max_video_seconds=1)
    assert load_video(films["mp4"], short, VideoSampling(timestamps=(0.1, 1.9))).times == (0.1, 1.9)
    with pytest.raises(MediaError, match="of video, the limit is 1 s"):
        load_video(films["mp4"], short, VideoSampling(video_start=0.1, video_end=1.9))


@pytest.mark.parametrize(
    "name", ["not a picture of a picture.mp4", "is accepted for pictures.mp4", "it is not a picture"]
)
def test_a_name_is_told_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for source in (path, str(path), path.as_uri()):
        with pytest.raises(MediaError) as caught:
            load_video(source)
        assert caught.value.message.startswith("no such file: ")
        assert caught.value.message.endswith(f"/{name}")
    for source, words in (
        ("", "the path or URL of a video is empty"),
        (3, "a int is not a video"),
        ("data:text/plain,of a picture", "a data: URL of text/plain is not a video"),
    ):
        with pytest.raises(MediaError, match=words):
            load_video(source)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="paths are not accepted for videos here"):
        load_video(path, MediaPolicy(allow_files=False))


def test_reading_and_decoding_may_take_so_long(films: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match="takes too long to read"):
        load_video(films["mp4"], MediaPolicy(max_video_decode_seconds=1e-9))
    video = load_video(films["mp4"])
    clock = itertools.count(step=100)
    monkeypatch.setattr(video_file, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with pytest.raises(MediaError, match=r"takes longer than 60 s to decode") as caught:
        video.frames[0].rgb()
    assert caught.value.code == "video_too_long"


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "album.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), "red"))))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(MediaError, match="has sound alone, no pictures"):
        load_video(tmp_path / "album.mp4")


def test_videos_are_fetched_as_pictures_are(films: dict[str, Path], site: Any, tmp_path: Path) -> None:
    here = MediaPolicy(allowed_private=("127.0.0.1",), timeout=10)
    site.picture = films["webm"].read_bytes()
    fetched = anyio.run(partial(aload_video, site.url("/octets"), here, VideoSampling(nframes=3)))
    assert fetched == load_video(films["webm"], sampling=VideoSampling(nframes=3))
    assert fetched.source == site.url("/octets")
    song = sound_alone(tmp_path / "song.mp4").read_bytes()
    for data, policy, words in (
        (site.picture, dataclasses.replace(here, max_video_bytes=1000), "more than the limit of 1000 bytes"),
        (site.picture[:900], here, "has no frames"),
        (song, here, "has sound alone, no pictures"),
        (site.picture, MediaPolicy(), "127.0.0.1"),
    ):
        site.picture = data
        with pytest.raises(MediaError, match=words) as caught:
            anyio.run(partial(aload_video, site.url("/octets"), policy))
        assert "\n" not in str(caught.value)


def test_contradictions_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nframes stands beside fps"):
        VideoSampling(fps=1, nframes=4)
    with pytest.raises(RequestError, match=r"content\[0\].fps is 'fast', not a number"):
        read_sampling({"fps": "fast"}, "content[0]")
    with pytest.raises(RequestError, match="nframes is not a whole number"):
        read_sampling({"nframes": 2.5}, "part")


def test_a_video_is_known_by_name_type_or_first_bytes(films: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "clip"
    bare.write_bytes(films["webm"].read_bytes())
    for source in (bare, str(bare), films["ts"].read_bytes(), "data:video/mp4;base64,AAAA", "https://a.b/c.MP4?x=1"):
        assert looks_like_video(source), source
    for source in ("https://a.b/c", "data:image/png;base64,AAAA", "photo.png", b"\x89PNG", 3):
        assert not looks_like_video(source), source
    # A length and a byte of its preview, at the places of the signs of a transport stream.
    assert not looks_like_video(b"\xff\xd8\xff\xe1G\x00Exif".ljust(196) + b"G")
