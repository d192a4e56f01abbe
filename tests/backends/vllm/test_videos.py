"""Videos in vLLM's own input: our frames and times, and the prompt and the answers of the local engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qvl import media
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.wire import Dialect, request_body
from qvl.backends.vllm.backend import DEFAULT_VIDEOS, VllmBackend
from qvl.errors import RequestError
from qvl.media.load_video import load_video
from qvl.media.video_sampling import VideoSampling
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.tiny import render
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart, VideoPart
from tests.backends.local.reference import NEAR_TIE
from tests.backends.token_engines import Loop, both
from tests.media.films import FORMS, film


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {ending: film(folder / f"clip.{ending}") for ending in FORMS}


def shown(path: Path, **sampling: object) -> VideoPart:
    return VideoPart(load_video(path, sampling=VideoSampling(**sampling)))  # type: ignore[arg-type]


def asked(*parts: object, **fields: object) -> ChatRequest:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, return_token_ids=True, **fields)  # type: ignore[arg-type]
    return ChatRequest((Message("user", parts),), sampling)  # type: ignore[arg-type]


def test_prompts_and_answers_are_those_of_the_local_engine(
    engine: VllmBackend, loop: Loop, films: dict[str, Path]
) -> None:
    assert engine.capabilities.videos == DEFAULT_VIDEOS
    odd, even = shown(films["mp4"], nframes=3), shown(films["mkv"], timestamps=(0.1, 0.4, 1.2, 1.9))
    still = ImagePart(media.load(render.sample(6100)[1]))
    question = TextPart("What changes?")
    requests = [
        asked(odd, question),
        # What stands before a time is one text with it, for the tokenizer.
        asked(TextPart("Look "), even, question),
        asked(TextPart("a<"), odd, TextPart("看"), even, question),
        asked(still, even, TextPart("and "), still, question),
        asked(question, even),
        asked(shown(films["ts"], nframes=1), question),
        asked(even, question, truncate_prompt_tokens=40),
    ]
    requests = [request.replace(sampling=replace(request.sampling, logprobs=4)) for request in requests]
    ours, its = both(loop, engine, requests)
    for own, other in zip(ours, its, strict=True):
        assert other.usage.prompt_tokens == own.usage.prompt_tokens
        assert other.usage.video_tokens == own.usage.video_tokens > 0
        assert other.prompt.token_ids == own.prompt.token_ids
        wanted, found = own.choices[0].token_ids, other.choices[0].token_ids
        equal = next((n for n, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), len(wanted))
        if equal < len(wanted):
            # Behind two tokens that are as likely as each other answers go apart; nowhere else.
            best, *others = (own.logprobs or ())[equal].top
            likely = {top.token for top in others if best.logprob - top.logprob < NEAR_TIE}
            assert (other.logprobs or ())[equal].token in likely, (equal, own.text, other.text)


def test_the_order_of_frames_reaches_the_model(engine: VllmBackend, loop: Loop, films: dict[str, Path]) -> None:
    video = shown(films["mp4"], nframes=4).video
    turned = video.with_frames(video.frames[::-1])
    requests = [
        ChatRequest((Message("user", (VideoPart(one), TextPart("When?"))),), SamplingParams(max_tokens=6, logprobs=1))
        for one in (video, turned)
    ]
    ours, its = both(loop, engine, requests)
    assert its[0].logprobs != its[1].logprobs
    for own, other in zip(ours, its, strict=True):
        assert [note.token for note in other.logprobs] == [note.token for note in own.logprobs]
        assert [n.logprob for n in other.logprobs] == pytest.approx([n.logprob for n in own.logprobs], abs=2e-3)


def test_every_container_gives_one_answer_here_and_in_the_local_engine(
    engine: VllmBackend, loop: Loop, films: dict[str, Path]
) -> None:
    async def answers(backend: VllmBackend | LocalBackend) -> list[tuple[object, ...]]:
        pipeline = AsyncPipeline(backend=backend, cache="off")
        told = []
        for path in films.values():
            result = await pipeline.ask(path, "When?", max_tokens=4, video={"nframes": 4})
            assert result.notes == ()
            usage = result.usage
            told.append((result.videos[0].times, usage.video_frames, usage.video_tokens, usage.prompt_tokens))
        return told

    async def local() -> list[tuple[object, ...]]:
        async with LocalBackend(dtype="float32", device="cpu", kv_cache_bytes=64 << 20) as backend:
            return await answers(backend)

    its = loop.run_until_complete(answers(engine))
    assert len(films) >= 5
    assert len(set(its)) == 1
    assert its[0][:2] == ((0.0, 0.6, 1.3, 1.9), 4)
    assert loop.run_until_complete(local()) == its


def test_more_videos_than_it_takes_are_sent_as_pictures_with_a_note(
    engine: VllmBackend, loop: Loop, films: dict[str, Path]
) -> None:
    pipeline = AsyncPipeline(backend=engine, cache="off")
    three = [films["mp4"], films["mkv"], films["avi"]]
    result = loop.run_until_complete(pipeline.ask(three, "When?", max_tokens=4, video={"nframes": 1}))
    assert result.usage.image_tokens > 0 == result.usage.video_tokens
    assert len(result.notes) == 3
    assert "clip.mp4: sent as 1 picture, each behind its time, since vllm:bundled takes at most 2" in result.notes[0]


def test_a_cut_through_a_video_is_refused(engine: VllmBackend, loop: Loop, films: dict[str, Path]) -> None:
    request = asked(shown(films["mp4"], nframes=4), TextPart("When?"))
    whole = loop.run_until_complete(engine.generate(request))
    ids = whole.prompt.token_ids if whole.prompt else ()
    pad = max(set(ids), key=ids.count)
    keep = len(ids) - ids.index(pad)
    for kept in (keep, keep - 1):
        with pytest.raises(RequestError, match=r"would cut a (video|picture) in two"):
            loop.run_until_complete(engine.generate(asked(*request.messages[0].parts, truncate_prompt_tokens=kept)))


def test_frames_that_an_endpoint_is_sent_are_read_by_vllm_with_their_times(films: dict[str, Path]) -> None:
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    part = shown(films["mkv"], timestamps=(0.2, 0.5, 1.9))
    body = json.loads(b"".join(request_body(asked(part), "m", Dialect(videos="frames"))))
    (sent,) = body["messages"][0]["content"]
    kind, _, text = sent["video_url"]["url"].removeprefix("data:").partition(";base64,")
    told = VideoMediaIO.merge_kwargs({"num_frames": 2}, body["media_io_kwargs"]["video"])
    frames, known = VideoMediaIO(ImageMediaIO(), **told).load_base64(kind, text).media
    assert np.array_equal(frames, np.stack([np.array(frame.rgb()) for frame in part.video.frames]))
    assert [at / known["fps"] for at in known["frames_indices"]] == [0.2, 0.5, 1.9]
    assert not known["do_sample_frames"]
