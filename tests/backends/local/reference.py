"""transformers' own answer to a ChatRequest, composed from its public pieces only."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from qvl.types import ChatRequest, ImagePart


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

    def inputs(self, request: ChatRequest) -> dict[str, Any]:
        messages = []
        for message in request.messages:
            content: Any = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in message.parts
            ]
            messages.append({"role": message.role, "content": content if message.pictures else message.text})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        given: dict[str, Any] = {}
        if request.pictures:
            pictures = [picture.rgb() for picture in request.pictures]
            given = dict(self.images(images=pictures, return_tensors="pt"))
            for grid in given["image_grid_thw"].tolist():
                tokens = grid[0] * grid[1] * grid[2] // 4
                text = text.replace("<|image_pad|>", "<|hole|>" * tokens, 1)
            text = text.replace("<|hole|>", "<|image_pad|>")
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            given["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return given

    def generate(self, request: ChatRequest, **more: Any) -> Any:
        """Greedy, as ids of the answer; or the whole output object when `return_dict_in_generate`."""
        inputs = self.inputs(request)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=request.sampling.max_tokens,
                top_k=None,
                top_p=None,
                temperature=None,
                **more,
            )
        return out if more.get("return_dict_in_generate") else out[0, inputs["input_ids"].shape[1] :].tolist()
