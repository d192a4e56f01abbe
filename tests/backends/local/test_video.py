"""Videos in the local engine: tokens, times and answers of transformers' own processor and generate."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.text.prompt import times_of_pairs
from qvl.media.load_video import load_video
from qvl.media.policy import MediaPolicy
from qvl.media.video_sampling import VideoSampling
from qvl.types import ChatRequest, ImagePart, Message, Part, SamplingParams, TextPart, VideoPart
from tests.backends.local.checkpoints import random_checkpoint, random_hybrid
from tests.backends.local.reference import Reference, clear
from tests.backends.local.requests import picture
from tests.backends.local.test_equals_generate import answer_all, check
from tests.media.films import film

if TYPE_CHECKING:
    from tests.backends.local.conftest import Opener


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[VideoPart]:
    """Videos of two to six frames, odd numbers of them among these, that keep their size, shrink and grow."""
    folder = tmp_path_factory.mktemp("films")
    made = []
    for number, size in enumerate(((128, 96), (160, 96), (64, 64), (320, 176))):
        path = film(folder / f"{number}.mp4", frames=12, size=size)
        made += [
            VideoPart(load_video(path, MediaPolicy(), sampling))
            for sampling in (VideoSampling(nframes=2 + number), VideoSampling(timestamps=(0.1, 0.5, 1.1)))
        ]
    return made


def asked(parts: list[VideoPart], count: int) -> list[ChatRequest]:
    dice = random.Random(5)
    requests = []
    for _ in range(count):
        shown: list[Part] = [dice.choice(parts) for _ in range(dice.choice((1, 1, 2)))]
        # What stands before a time is one text with it, for the tokenizer.
        shown.insert(dice.randrange(2), TextPart(dice.choice(("Look ", "a<", "看", "Two:\n"))))
        if dice.random() < 0.5:
            shown.insert(dice.randrange(3), ImagePart(picture(dice.randrange(12))))
        shown.append(TextPart("When does it end?"))
        sampling = SamplingParams(max_tokens=8, ignore_eos=True)
        requests.append(ChatRequest((Message("user", tuple(shown)),), sampling))
    return requests


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_answers_about_videos_equal_generate(
    opened: Opener, tmp_path_factory: pytest.TempPathFactory, parts: list[VideoPart], family: str
) -> None:
    folder = tmp_path_factory.mktemp(family)
    if family == "qwen3_5":
        pytest.importorskip("transformers.models.qwen3_5", reason="this transformers does not know Qwen3.5")
        random_hybrid(folder)
    else:
        random_checkpoint(folder)
    reference = Reference(folder)
    requests, expected = clear(asked(parts, 10), reference.generate)
    backend = opened(folder, max_num_seqs=6, max_num_batched_tokens=160)
    answered = answer_all(backend, requests)
    check(reference, answered, expected)
    for request, result in zip(requests, answered, strict=True):
        inputs = reference.inputs(request)
        assert result.usage.prompt_tokens == inputs["input_ids"].shape[1]
        video = int((inputs["input_ids"] == reference.model.config.video_token_id).sum())
        assert result.usage.video_tokens == video > 0


def test_the_order_of_frames_reaches_the_model(opened: Opener, tmp_path: Path, parts: list[VideoPart]) -> None:
    backend = opened(random_checkpoint(tmp_path / "model"), max_num_seqs=4)
    video = parts[0].video
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1)
    turned = VideoPart(video.with_frames(video.frames[::-1]))
    one, other = answer_all(
        backend, [ChatRequest((Message("user", (part, TextPart("q"))),), sampling) for part in (parts[0], turned)]
    )
    assert one.logprobs != other.logprobs


@pytest.mark.parametrize(
    ("times", "told"),
    [
        # A clip of 380 frames at 30 a second, 8 of them evenly spread and 8 at will: their own times are told.
        ([round(i * 379 / 7) / 30 for i in range(8)], [0.9, 4.5, 8.1, 11.7]),
        ([40 / 30, 68 / 30, 133 / 30, 167 / 30, 217 / 30, 233 / 30, 280 / 30, 302 / 30], [1.8, 5.0, 7.5, 9.7]),
        ([0.0, 0.5, 1.0], [0.2, 1.0]),
        ([3.0], [3.0]),
    ],
)
def test_the_time_of_two_frames_is_the_middle_of_their_own(times: list[float], told: list[float]) -> None:
    module = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    assert [float(f"{at:.1f}") for at in times_of_pairs(times)] == told
    theirs = module.Qwen3VLProcessor._calculate_timestamps(SimpleNamespace(), list(times), 1.0, 2)
    assert times_of_pairs(times) == pytest.approx(theirs)


@pytest.mark.slow
@pytest.mark.asyncio
async def test_frames_that_were_chosen_differently_are_told_with_different_times(tmp_path: Path) -> None:
    """A clip of 380 frames at 30 a second, 8 of them shown: the model reads when each of them is."""
    clip = film(tmp_path / "clip.mp4", frames=380, fps=30, size=(64, 48))
    at_will = tuple(number / 30 for number in (40, 68, 133, 167, 217, 233, 280, 302))
    evenly = tuple(round(number * 379 / 7) / 30 for number in range(8))
    cases = (
        (VideoSampling(nframes=8), [0.9, 4.5, 8.1, 11.7]),
        (VideoSampling(timestamps=evenly), [0.9, 4.5, 8.1, 11.7]),
        (VideoSampling(timestamps=at_will), [1.8, 5.0, 7.5, 9.7]),
        (VideoSampling(nframes=8, video_start=4, video_end=8), [4.3, 5.4, 6.6, 7.7]),
    )
    async with LocalBackend(device="cpu", kv_cache_bytes=64 << 20) as backend:
        for sampling, told in cases:
            part = VideoPart(load_video(clip, sampling=sampling))
            tokens = await backend.tokenize(ChatRequest((Message("user", (part, TextPart("When?"))),)), texts=True)
            shown = "".join(tokens.texts or ())
            assert [float(at) for at in re.findall(r"<([\d.]+) seconds><\|vision_start\|>", shown)] == told
