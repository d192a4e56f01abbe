"""Videos in vLLM's own input: the frames that we chose, with their times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qvl.backends.local.text.prompt import times_of_pairs
from qvl.errors import RequestError
from qvl.types import VideoPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from vllm.v1.engine.async_llm import AsyncLLM

    from qvl.backends.local.text.processor import PreparedPicture, PreparedRequest
    from qvl.types import ChatRequest, JsonObject


@dataclass(frozen=True, slots=True)
class PromptVideo:
    """A video of a prompt: every two frames of it in a row, and the seconds of each of these."""

    pairs: tuple[PreparedPicture, ...]
    times: tuple[float, ...]


def shown_videos(prepared: PreparedRequest, request: ChatRequest) -> list[PromptVideo]:
    """Return the videos of a prompt in order; of one whose beginning was cut off, what is left.

    Raises:
        RequestError: the mark in front of a frame was cut off.
    """
    parts = [part for message in request.messages for part in message.parts if isinstance(part, VideoPart)]
    pairs = [picture for picture in prepared.pictures if picture.video]
    videos: list[PromptVideo] = []
    for part in reversed(parts):
        times = times_of_pairs(part.video.times)[-len(pairs) :] if pairs else []
        if times:
            videos.insert(0, PromptVideo(tuple(pairs[-len(times) :]), tuple(times)))
            del pairs[-len(times) :]
    if videos and not videos[0].pairs[0].start:
        what = f"truncate_prompt_tokens={request.sampling.truncate_prompt_tokens} would cut a video in two"
        raise RequestError(what, hint="keep more, or fewer", param="truncate_prompt_tokens")
    return videos


def placeholders(prepared: PreparedRequest, videos: Sequence[PromptVideo]) -> list[int]:
    """Return the shortest prompt in which vLLM's renderer finds every picture and video."""
    first = {id(video.pairs[0]) for video in videos}
    tokens: list[int] = []
    for picture in prepared.pictures:
        if not picture.video:
            tokens.append(prepared.tokens[picture.start])
        elif id(picture) in first:
            # Between its marks, since older versions of transformers write those anew.
            tokens += [*prepared.tokens[picture.start - 1 : picture.start + 1], prepared.tokens[picture.end]]
    return tokens


def video_of(video: PromptVideo) -> tuple[NDArray[np.uint8], JsonObject]:
    """Return a video as vLLM takes it: uint8 [frames, height, width, 3], and what is known of it."""
    frames = np.concatenate([pair.pixels for pair in video.pairs if pair.pixels is not None])
    # Both frames of a pair at its time, the middle of which that is again.
    at = [time for time in video.times for _ in range(2)]
    known = {"fps": 1.0, "frames_indices": at, "total_num_frames": len(at), "do_sample_frames": False}
    return frames, {**known, "duration": at[-1], "video_backend": "qvl"}


async def rendered(
    engine: AsyncLLM, prompt: JsonObject, prepared: PreparedRequest, videos: Sequence[PromptVideo]
) -> JsonObject:
    """Return vLLM's input of a prompt with videos: pixels as its renderer prepares them, between our tokens.

    vLLM by itself would encode each time apart from the text in front of it, and so to other tokens than the model
    was trained with.
    """
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    (made,) = await engine.renderer.render_cmpl_async([prompt])
    ranges: JsonObject = {}
    for picture in prepared.pictures:
        if not picture.video:
            ranges.setdefault("image", []).append(PlaceholderRange(picture.start, picture.num_tokens))
    for video in videos:
        start, end = video.pairs[0].start - 1, video.pairs[-1].end + 1
        embeds = torch.zeros(end - start, dtype=torch.bool)
        for pair in video.pairs:
            embeds[pair.start - start : pair.end - start] = True
        ranges.setdefault("video", []).append(PlaceholderRange(start, end - start, embeds))
    return {**made, "prompt_token_ids": prepared.tokens, "mm_placeholders": ranges}
