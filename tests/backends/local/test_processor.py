"""Prompts and pixels are those of transformers' own processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qvl.backends.local.model import loader
from qvl.backends.local.model.device import open_device
from qvl.backends.local.model.kernels import Kernels
from qvl.backends.local.model.linear import LinearPlan
from qvl.backends.local.model.vision import VisionTower
from qvl.backends.local.text.processor import ImageRules, Processor

if TYPE_CHECKING:
    from qvl.types import ChatRequest
    from tests.backends.local.reference import Reference


def test_tokens_positions_and_pixels_equal_transformers(
    random_folder: Path, random_reference: Reference, mixed_300: list[ChatRequest]
) -> None:
    device = open_device("cpu", "float32")
    checkpoint = loader.load(str(random_folder), device)
    rules = ImageRules.read(checkpoint.image_config)
    processor = Processor(checkpoint.tokenizer, rules, checkpoint.model.config.image_token_id)
    encoder = VisionTower(checkpoint.model.model.visual, rules, Kernels(), LinearPlan())
    for request in mixed_300[:40]:
        ours, theirs = processor.prepare(request), random_reference.inputs(request)
        assert ours.tokens == theirs["input_ids"][0].tolist()
        grids = theirs.get("image_grid_thw")
        indexed = {key: theirs[key] for key in ("mm_token_type_ids", "attention_mask") if key in theirs}
        positions, delta = random_reference.model.model.get_rope_index(
            theirs["input_ids"], image_grid_thw=grids, **indexed
        )
        np.testing.assert_array_equal(ours.positions, positions[:, 0].numpy())
        assert ours.position_delta == int(delta)
        if grids is not None:
            assert [list(picture.grid) for picture in ours.pictures] == grids[:, 1:].tolist()
            pixels = torch.cat([encoder.patches(picture.pixels) for picture in ours.pictures])
            # Theirs holds every frame twice: [patch, channel, frame, y, x].
            frames = theirs["pixel_values"].view(len(pixels), 3, 2, -1)
            torch.testing.assert_close(pixels.view(len(pixels), 3, -1), frames[:, :, 0], atol=2e-6, rtol=0)
