"""Pictures to features: the vision tower, and what is kept of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from qvl.backends.local.linear import pack_modules

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qvl.backends.local.device import Device
    from qvl.backends.local.processor import ImageRules, PreparedPicture


class FeatureCache:
    """Features by picture key, at most `max_bytes`, the least recently used dropped first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Tensor | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found

    def put(self, key: str, features: Tensor) -> None:
        with self._lock:
            if features.nbytes > self.max_bytes or key in self._kept:
                return
            self._kept[key] = features
            self.num_bytes += features.nbytes
            while self.num_bytes > self.max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self.num_bytes -= dropped.nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


class VisionEncoder:
    """Runs transformers' vision tower.

    Its patch embedding, a Conv3d whose stride is its kernel, is computed as the matrix product that it is: the same
    numbers, without the slow convolution kernels of CPUs and NPUs. A still picture fills both frames of a patch, so the
    kernels of the two frames are added up once.
    """

    def __init__(self, visual: Any, rules: ImageRules, device: Device) -> None:
        self._visual = visual
        self._rules = rules
        self._device = device
        weight = visual.patch_embed.proj.weight
        self._place = weight.device
        visual.patch_embed = _patch_embedding(visual.patch_embed.proj)
        self._dtype = weight.dtype
        pack_modules(visual)

    def encode(self, pictures: list[PreparedPicture]) -> list[Tensor]:
        """Features of each picture: [1 + deepstack layers, num_tokens, hidden], the merged ones first."""
        import torch

        patches = torch.cat([self.patches(picture.pixels) for picture in pictures])
        grid = torch.tensor([(1, *picture.grid) for picture in pictures], device=self._place)
        out = self._visual(patches.to(self._dtype), grid_thw=grid)
        merged, deep = (out.pooler_output, out.deepstack_features) if hasattr(out, "pooler_output") else out
        stacked = torch.stack([merged, *deep])
        return [
            part.clone()
            for part in torch.split_with_sizes(stacked, [picture.num_tokens for picture in pictures], dim=1)
        ]

    def patches(self, pixels: np.ndarray[Any, Any] | None) -> Tensor:
        """float32 [patches, 3 * patch * patch], normalised, in the order in which the merger wants them."""
        import torch

        if pixels is None:
            raise RuntimeError("a picture has neither pixels nor features")
        rules = self._rules
        size, merge = rules.patch_size, rules.merge_size
        image = torch.from_numpy(pixels).to(self._place).permute(2, 0, 1).float()
        mean = torch.tensor(rules.mean, device=self._place).view(3, 1, 1)
        std = torch.tensor(rules.std, device=self._place).view(3, 1, 1)
        image = (image * (1 / 255) - mean) / std
        rows, columns = image.shape[1] // size, image.shape[2] // size
        cut = image.view(3, rows // merge, merge, size, columns // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        return cut.reshape(rows * columns, 3 * size * size)


def _patch_embedding(convolution: Any) -> torch.nn.Module:
    from torch import nn

    weight = convolution.weight  # [hidden, 3, frames, patch, patch]
    linear = nn.Linear(weight[0, :, 0].numel(), weight.shape[0], bias=convolution.bias is not None)
    linear.weight = nn.Parameter(
        weight.detach().float().sum(2).reshape(weight.shape[0], -1).to(weight.dtype), requires_grad=False
    )
    if convolution.bias is not None:
        linear.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)
    return linear
