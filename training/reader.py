"""Inference of a checkpoint with plain transformers: batches, left padding, greedy answers, without qvl's backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

PLACEHOLDER: Final = "<|image_pad|>"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """Chat messages whose image parts refer to `images` in order."""

    messages: list[Message]
    images: tuple[Image.Image, ...] = ()


def user(text: str, pictures: int = 1) -> Message:
    """Return a user message with `pictures` image parts before the text."""
    parts: list[Message] = [{"type": "image"} for _ in range(pictures)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Reader:
    """A model loaded in float32 from a checkpoint folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        self.processor = image_processor(folder)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.device = device

    def answer(self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch: int = 32) -> list[str]:
        """Return one answer per request, in order, without special tokens."""
        answers: list[str] = []
        for start in range(0, len(requests), batch):
            answers += self._answer_batch(requests[start : start + batch], max_new_tokens)
        return answers

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return a batch: input_ids, attention_mask and, with pictures, pixel_values and image_grid_thw."""
        images = [image for request in requests for image in request.images]
        encoded = self.processor(images, return_tensors="pt") if images else {}
        counts = iter((encoded["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist() if images else ())
        texts = []
        for request in requests:
            text = self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            pieces = text.split(PLACEHOLDER)
            if len(pieces) - 1 != len(request.images):
                raise ValueError(f"{len(pieces) - 1} image parts in the messages, {len(request.images)} images")
            texts.append(pieces[0] + "".join(PLACEHOLDER * next(counts) + piece for piece in pieces[1:]))
        inputs = dict(self.tokenizer(texts, return_tensors="pt", padding=True))
        if images:
            inputs |= {"pixel_values": encoded["pixel_values"], "image_grid_thw": encoded["image_grid_thw"]}
            if _wants_token_types():
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _answer_batch(self, requests: Sequence[Request], max_new_tokens: int) -> list[str]:
        import torch

        inputs = self.inputs(requests)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(fresh, skip_special_tokens=True)]


def _wants_token_types() -> bool:
    from importlib.metadata import version

    return int(version("transformers").split(".")[0]) >= 5


def image_processor(folder: Path) -> Any:
    """Return the PIL image processor, which needs no torchvision; its name differs between transformers 4 and 5."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    return Processor.from_pretrained(folder)
