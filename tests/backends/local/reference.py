"""transformers' own answer to a ChatRequest, composed from its public pieces only."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qvl.types import ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qvl.media.video import Video

# Logits that are nearer than this change places with the order in which a processor adds up: in float32 that moves
# them by a millionth.
NEAR_TIE = 1e-4

Asked = TypeVar("Asked")


class NearTie(AssertionError):
    """transformers' own answer hangs on the last bits of two logits."""


@dataclass
class VideoMetadata:
    """What transformers' processor reads of a video: with one frame a second, indices are times."""

    total_num_frames: int
    fps: float
    frames_indices: list[float]


def _image_processor(folder: Path) -> Any:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Pil
    except ImportError:
        from transformers import Qwen2VLImageProcessor as Pil  # 4.57: the slow one is the PIL one

        # It knows the limits by their older names only, and passes over `size`.
        size = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["size"]
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        return Pil.from_pretrained(str(folder), **limits)
    return Pil.from_pretrained(str(folder))


class Reference:
    """Loads `folder` in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        self.images = _image_processor(folder)
        self.folder = folder

    def inputs(self, request: ChatRequest) -> dict[str, Any]:
        messages = []
        for message in request.messages:
            content: Any = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image" if isinstance(part, ImagePart) else "video"}
                for part in message.parts
            ]
            messages.append({"role": message.role, "content": content if message.pictures else message.text})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        given: dict[str, Any] = {}
        parts = [part for message in request.messages for part in message.parts]
        for video in request.videos:
            text, more = self._video(text, video)
            given = {name: torch.cat([given[name], value]) if name in given else value for name, value in more.items()}
        text = text.replace("<|frame|>", "<|video_pad|>")
        pictures = [part.picture.rgb() for part in parts if isinstance(part, ImagePart)]
        if pictures:
            given |= dict(self.images(images=pictures, return_tensors="pt"))
            for grid in given["image_grid_thw"].tolist():
                tokens = grid[0] * grid[1] * grid[2] // 4
                text = text.replace("<|image_pad|>", "<|hole|>" * tokens, 1)
            text = text.replace("<|hole|>", "<|image_pad|>")
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            given["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int() + 2 * (
                ids == self.model.config.video_token_id
            ).int()
        return given

    def _video(self, text: str, video: Video) -> tuple[str, dict[str, Any]]:
        """The prompt and the pixels of one video, by the parts of transformers' processors that need no torchvision."""
        # By their full names: the package itself gives a stand-in where torchvision is missing.
        home = "transformers.models.qwen3_vl"
        processing_qwen3_vl = import_module(f"{home}.processing_qwen3_vl")
        video_processing_qwen3_vl = import_module(f"{home}.video_processing_qwen3_vl")
        processor = video_processing_qwen3_vl.Qwen3VLVideoProcessor
        if not hasattr(processor, "patchify"):
            pytest.skip("this transformers cuts videos into patches within a method that needs torchvision")
        settings = json.loads((self.folder / "video_preprocessor_config.json").read_text(encoding="utf-8"))
        frames = [frame.rgb() for frame in video.frames]
        height, width = video_processing_qwen3_vl.smart_resize(
            max(2, len(frames)),
            frames[0].height,
            frames[0].width,
            factor=32,
            min_pixels=settings["size"]["shortest_edge"],
            max_pixels=settings["size"]["longest_edge"],
        )
        pixels = np.stack([np.array(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames])
        normal = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        patches, count, rows, columns = processor.patchify(None, normal[None], 16, 2, 2)
        grid = torch.tensor([[count, rows, columns]])
        inputs = {"video_grid_thw": grid, "video_metadata": [VideoMetadata(len(frames), 1.0, list(video.times))]}
        writer = SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
            _calculate_timestamps=partial(processing_qwen3_vl.Qwen3VLProcessor._calculate_timestamps, None),
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
            video_token="<|frame|>",
        )
        shown = processing_qwen3_vl.Qwen3VLProcessor.replace_video_token(writer, inputs, 0)
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", shown, 1)
        return text, {"pixel_values_videos": patches[0], "video_grid_thw": grid}

    def output(self, request: ChatRequest, **more: Any) -> Any:
        """What transformers' greedy `generate` returns as an object, with the logits of every token."""
        with torch.inference_mode():
            return self.model.generate(
                **self.inputs(request),
                do_sample=False,
                max_new_tokens=request.sampling.max_tokens,
                top_k=None,
                top_p=None,
                temperature=None,
                return_dict_in_generate=True,
                output_logits=True,
                **more,
            )

    def generate(self, request: ChatRequest) -> list[int]:
        """The ids of the greedy answer; raises NearTie where another processor may write another."""
        out = self.output(request)
        best = torch.cat(out.logits).float().topk(2).values
        margins = (best[:, 0] - best[:, 1]).tolist()
        if min(margins) < NEAR_TIE:
            at = margins.index(min(margins))
            raise NearTie(f"the two best logits of token {at} differ by {margins[at]:.1e}: ask something else")
        ids: list[int] = out.sequences[0, -len(margins) :].tolist()
        return ids


def clear(asked: Sequence[Asked], answer: Callable[[Asked], list[int]]) -> tuple[list[Asked], list[list[int]]]:
    """Those of `asked` whose answers another processor writes too, and these answers.

    Near ties are left out, one in a hundred at most (rounded up).
    """
    kept, answers, ties = [], [], []
    for one in asked:
        try:
            answers.append(answer(one))
        except NearTie as exc:
            ties.append(str(exc))
        else:
            kept.append(one)
    assert len(ties) <= math.ceil(len(asked) / 100), ties
    return kept, answers
