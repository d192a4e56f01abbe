"""Pictures to features: the vision tower, and what is kept of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.linear import Linear, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers.models.qwen3_vl.modeling_qwen3_vl import (
        Qwen3VLVisionBlock,
        Qwen3VLVisionModel,
        Qwen3VLVisionPatchMerger,
    )

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.text.processor import ImageRules, PreparedPicture


# transformers' activations that are torch's gelu, and which of its two forms they are.
GELU: Final = {"GELUTanh": "tanh", "GELUActivation": "none"}


class FeatureCache:
    """Features by picture key, at most `max_bytes`, the least recently used dropped first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, *, counted: bool = True) -> Tensor | None:
        """Return the features of `key`; `counted` is False for a second look on behalf of the same request."""
        with self._lock:
            features = self._kept.get(key)
            self.hits += counted and features is not None
            self.misses += counted and features is None
            if features is not None:
                self._kept.move_to_end(key)
            return features

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


class VisionTower:
    """Qwen3-VL's vision tower: transformers' weights, our loop, so that a large picture can be encoded in slices.

    Its patch embedding, a Conv3d whose stride is its kernel, is computed as the matrix product that it is: the same
    numbers, without the slow convolution kernels of CPUs and NPUs. A still picture fills both frames of a patch, so the
    kernels of the two frames are added up once.
    """

    def __init__(self, visual: Qwen3VLVisionModel, rules: ImageRules, kernels: Kernels) -> None:
        self._rules = rules
        self._kernels = kernels
        self._embed = _patch_embedding(visual.patch_embed.proj)
        self._table: Tensor = visual.pos_embed.weight
        self._frequencies: Tensor = visual.rotary_pos_emb.inv_freq
        self._blocks = [_Block(block) for block in visual.blocks]
        self._merger = _Merger(visual.merger, after_merging=False)
        mergers = zip(visual.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)
        self._deep = {index: _Merger(merger, after_merging=True) for index, merger in mergers}

    def cost(self, picture: PreparedPicture) -> int:
        """Return the multiplications that a picture takes."""
        patches = picture.grid[0] * picture.grid[1]
        hidden = self._table.shape[1]
        linear = self._embed.size + sum(block.qkv.size + block.rest for block in self._blocks)
        merging = sum(merger.size for merger in (self._merger, *self._deep.values())) // self._rules.merge_size**2
        return patches * (linear + merging + len(self._blocks) * 2 * patches * hidden)

    def encode(self, pictures: list[PreparedPicture]) -> list[Tensor]:
        """Return the features of each picture: [1 + deepstack layers, num_tokens, hidden], the merged ones first."""
        *_, features = self.slices(pictures)
        assert features is not None
        return features

    def slices(self, pictures: list[PreparedPicture], work: float = float("inf")) -> Iterator[list[Tensor] | None]:
        """Yield None each time that about `work` multiplications are done, and last what `encode` returns."""
        import torch

        hidden = torch.cat([self._embedded(picture) for picture in pictures])
        rotary = self._rotary(pictures)
        ends = list(accumulate(picture.grid[0] * picture.grid[1] for picture in pictures))
        total, width = hidden.shape
        meter = _Meter(work)
        merged: list[Tensor] = []
        heads: Tensor | None = None
        for index, block in enumerate(self._blocks):
            if heads is None or block.device != hidden.device:
                hidden, rotary = hidden.to(block.device), (rotary[0].to(block.device), rotary[1].to(block.device))
                # Queries, keys and values, each [heads, patches, head_dim].
                heads = hidden.new_empty((3, block.num_heads, total, width // block.num_heads))
                attended = torch.empty_like(hidden)
            for rows in meter.parts(0, total, block.qkv.size):
                if meter.pauses(rows, block.qkv.size):
                    yield None
                joined = block.qkv(block.norm1(hidden[rows])).view(-1, 3 * block.num_heads, heads.shape[-1])
                both = joined[:, : 2 * block.num_heads].float()
                rotated = self._kernels.apply_rotary(both, rotary[0][rows], rotary[1][rows])
                heads.view(-1, total, heads.shape[-1])[: 2 * block.num_heads, rows] = rotated.transpose(0, 1)
                heads[2, :, rows] = joined[:, 2 * block.num_heads :].transpose(0, 1)
            for first, last in pairwise([0, *ends]):
                cost = 2 * (last - first) * width
                keys, values = heads[1:2, :, first:last], heads[2:3, :, first:last]
                for rows in meter.parts(first, last, cost):
                    if meter.pauses(rows, cost):
                        yield None
                    out = self._kernels.attention(heads[:1, :, rows], keys, values)
                    attended[rows] = out[0].transpose(0, 1).reshape(-1, width)
            for rows in meter.parts(0, total, block.rest):
                if meter.pauses(rows, block.rest):
                    yield None
                hidden[rows] = block.finish(hidden[rows], attended[rows])
            if index in self._deep:
                merged.append(self._deep[index](hidden))
        merged.insert(0, self._merger(hidden))
        features = torch.stack([part.to(merged[0].device) for part in merged])
        counts = [picture.num_tokens for picture in pictures]
        yield [part.clone() for part in torch.split_with_sizes(features, counts, dim=1)]

    def patches(self, pixels: NDArray[np.uint8] | None) -> Tensor:
        """Return float32 [patches, 3 * patch * patch], normalised, in the order in which the merger wants them."""
        import torch

        if pixels is None:
            raise RuntimeError("a picture has neither pixels nor features")
        rules, device = self._rules, self._table.device
        size, merge = rules.patch_size, rules.merge_size
        image = torch.from_numpy(pixels).to(device).permute(2, 0, 1).float()
        mean = torch.tensor(rules.mean, device=device).view(3, 1, 1)
        std = torch.tensor(rules.std, device=device).view(3, 1, 1)
        image = (image * (1 / 255) - mean) / std
        rows, columns = image.shape[1] // size, image.shape[2] // size
        cut = image.view(3, rows // merge, merge, size, columns // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        return cut.reshape(rows * columns, 3 * size * size)

    def _embedded(self, picture: PreparedPicture) -> Tensor:
        """Return [patches, hidden]: pixels and places, whose learned square table is stretched over the picture."""
        import torch

        table = self._table
        side = int(table.shape[0] ** 0.5)
        # float64 on no device but the host has it everywhere; float32 is what transformers interpolates in.
        axes = []
        for count in picture.grid:
            position = torch.arange(count, dtype=torch.float32) * (side - 1) / (count - 1)
            low = position.long().clamp(max=side - 1)
            axes.append(((low, 1 - (position - low)), ((low + 1).clamp(max=side - 1), position - low)))
        embedding = torch.zeros((), dtype=torch.float32, device=table.device)
        for row, row_weight in axes[0]:
            for column, column_weight in axes[1]:
                index = self._merged_order(row[:, None] * side + column).to(table.device)
                weight = self._merged_order(row_weight[:, None] * column_weight).to(table.device)
                embedding = embedding + table.index_select(0, index) * weight[:, None]
        patches = self._embed(self.patches(picture.pixels).to(table.dtype))
        return patches + embedding.to(table.dtype)

    def _rotary(self, pictures: list[PreparedPicture]) -> tuple[Tensor, Tensor]:
        """Return the rotation by row (first half of the frequencies) and column (second half) of patches; float32."""
        import torch

        positions = []
        for picture in pictures:
            rows, columns = (torch.arange(count, dtype=torch.float32) for count in picture.grid)
            both = (rows[:, None].expand(picture.grid), columns.expand(picture.grid))
            positions.append(torch.stack([self._merged_order(axis) for axis in both], 1))
        frequencies = self._frequencies.float()
        angles = torch.cat(positions).to(frequencies.device)[:, :, None] * frequencies
        return self._kernels.rotary_cos_sin(angles.flatten(1), torch.float32)

    def _merged_order(self, grid: Tensor) -> Tensor:
        """Return a value of each patch [rows, columns] in the patches' order: merged squares one by one."""
        merge = self._rules.merge_size
        rows, columns = grid.shape
        return grid.reshape(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten()


class _Meter:
    """Cuts work into slices of about `work` multiplications."""

    def __init__(self, work: float) -> None:
        self._work = work
        self._done = 0

    def parts(self, first: int, last: int, cost: int) -> list[slice]:
        """Return the rows first:last, each of which costs `cost`, in pieces that do not cost more than a slice."""
        size = last - first if self._work == float("inf") else max(1, int(self._work // cost))
        return [slice(start, min(start + size, last)) for start in range(first, last, size)]

    def pauses(self, rows: slice, cost: int) -> bool:
        """True if a slice ends before these rows, which are then counted to the next."""
        work = (rows.stop - rows.start) * cost
        self._done += work
        if self._done <= self._work or self._done == work:
            return False
        self._done = work
        return True


class _Block:
    """The weights of one block of the tower. `rest` is the size of all behind the attention."""

    def __init__(self, block: Qwen3VLVisionBlock) -> None:
        attention, mlp = block.attn, block.mlp
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.device = block.norm1.weight.device
        self.num_heads: int = attention.num_heads
        self.qkv = join((attention.qkv,))
        self._proj, self._up, self._down = join((attention.proj,)), join((mlp.linear_fc1,)), join((mlp.linear_fc2,))
        self._act = mlp.act_fn
        self.rest = self._proj.size + self._up.size + self._down.size

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = self._proj.added_to(hidden, attended)
        return self._down.added_to(hidden, _activated(self._up, self.norm2(hidden), self._act))


class _Merger:
    """Several patches to one token of the text model."""

    def __init__(self, merger: Qwen3VLVisionPatchMerger, *, after_merging: bool) -> None:
        self._norm: nn.Module = merger.norm
        self._after_merging = after_merging
        self._fc1, self._fc2 = join((merger.linear_fc1,)), join((merger.linear_fc2,))
        self._act = merger.act_fn
        self._width: int = merger.linear_fc1.in_features
        self._device = merger.norm.weight.device
        self.size = self._fc1.size + self._fc2.size

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self._device)
        normed = self._norm(hidden.view(-1, self._width) if self._after_merging else hidden).view(-1, self._width)
        return self._fc2(_activated(self._fc1, normed, self._act))


def _activated(linear: Linear, x: Tensor, act: nn.Module) -> Tensor:
    """Return act(linear(x)), in one pass where the activation is one that a matrix product can end with."""
    approximate = GELU.get(type(act).__name__)
    if approximate is None:
        activated: Tensor = act(linear(x))
        return activated
    return linear.gelu(x, approximate)


def _patch_embedding(convolution: nn.Conv3d) -> Linear:
    weight = convolution.weight.detach()  # [hidden, 3, frames, patch, patch]
    flat = weight.float().sum(2).reshape(weight.shape[0], -1).to(weight.dtype)
    return Linear(flat, None if convolution.bias is None else convolution.bias.detach())
