"""The vision tower, which computes the features of pictures, and the cache of features."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.attention_times import Heads
from qvl.backends.local.model.linear import AdapterRows

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers.models.qwen3_vl.modeling_qwen3_vl import (
        Qwen3VLVisionBlock,
        Qwen3VLVisionMLP,
        Qwen3VLVisionModel,
        Qwen3VLVisionPatchMerger,
    )

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import Linear, LinearPlan
    from qvl.backends.local.text.processor import ImageRules, PreparedPicture


# transformers' activations that are torch's gelu, and which of its two forms they are.
GELU: Final = {"GELUTanh": "tanh", "GELUActivation": "none", "GELU": "none"}


class FeatureCache:
    """LRU cache of picture features by picture key, at most `max_bytes`. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, *, counted: bool = True) -> Tensor | None:
        """Return the features of `key`, or None; `counted=False` does not count a hit or miss (a repeated look-up)."""
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
    """Qwen3-VL's and Qwen3.5's vision tower with transformers' weights; it can encode a picture in pieces.

    The patch embedding, a Conv3d whose stride equals its kernel, is computed as a matrix product: the same numbers,
    without the slow convolution kernels of CPUs and NPUs. A still picture fills both frames of a patch, so the kernels
    of the two frames are summed once; for two frames of a video they stay apart.
    """

    def __init__(self, visual: Qwen3VLVisionModel, rules: ImageRules, kernels: Kernels, plan: LinearPlan) -> None:
        self._rules = rules
        self._kernels = kernels
        self._embed = _patch_embedding(visual.patch_embed.proj, plan, moving=False)
        self._embed_frames = _patch_embedding(visual.patch_embed.proj, plan, moving=True)
        patches: Tensor = visual.patch_embed.proj.weight
        self._width, self._device, self._dtype = len(patches), patches.device, patches.dtype
        self._frequencies: Tensor = visual.rotary_pos_emb.inv_freq
        self._blocks = [self._block(block, plan) for block in visual.blocks]
        heads = self._blocks[0].num_heads
        kernels.choose_attention(Heads(heads, heads, self._width // heads), self._dtype)
        self._read_ends(visual, plan)

    def _block(self, block: Qwen3VLVisionBlock, plan: LinearPlan) -> Block:
        return Block(block, plan)

    def _read_ends(self, visual: Qwen3VLVisionModel, plan: LinearPlan) -> None:
        """Read what stands before and behind the blocks: position embeddings and mergers."""
        self._table: Tensor = visual.pos_embed.weight
        self._merger = _merger(visual.merger, plan, after_merging=False)
        # Qwen3.5's tower gives its last block's features alone.
        deep = getattr(visual, "deepstack_visual_indexes", ()), getattr(visual, "deepstack_merger_list", ())
        mergers = zip(*deep, strict=True)
        self._deep = {index: _merger(merger, plan, after_merging=True) for index, merger in mergers}

    def cost(self, picture: PreparedPicture) -> int:
        """Return the number of multiplications for encoding `picture`."""
        patches = picture.grid[0] * picture.grid[1]
        embed = self._embed_frames if picture.video else self._embed
        linear = embed.size + sum(block.qkv.size + block.rest for block in self._blocks)
        merging = sum(merger.size for merger in (self._merger, *self._deep.values())) // self._rules.merge_size**2
        return patches * (linear + merging) + 2 * self._width * self._pairs(picture)

    def _pairs(self, picture: PreparedPicture) -> int:
        """Return how many pairs of a picture's patches attend to each other, in all blocks together."""
        return len(self._blocks) * (picture.grid[0] * picture.grid[1]) ** 2

    def encode(self, pictures: list[PreparedPicture]) -> list[Tensor]:
        """Return the features of each picture: [1 + deepstack layers, num_tokens, hidden], the merged ones first."""
        encoding = self.pieces(pictures)
        while True:
            try:
                next(encoding)
            except StopIteration as end:
                features: list[Tensor] = end.value
                return features

    def pieces(
        self, pictures: list[PreparedPicture], largest: float = float("inf")
    ) -> Generator[float, None, list[Tensor]]:
        """Return the features that `encode` returns; before each piece of the work, yield its multiplications.

        A piece has at most about `largest`. The pieces depend on the pictures and on `largest` alone, so the features
        are the same to the last bit however many pieces are computed at a time.
        """
        import torch

        parts: list[Tensor] = []
        # Pictures of one request, which has one adapter.
        adapted = (AdapterRows(pictures[0].adapter, None),) if pictures[0].adapter else ()
        for picture in pictures:
            parts += yield from self._embedded(picture, largest)
        hidden, rotary = self._in_order(pictures, torch.cat(parts), self._rotary(pictures))
        total, width = hidden.shape
        merged: list[Tensor] = []
        heads: Tensor | None = None
        for index, block in enumerate(self._blocks):
            if heads is None or block.device != hidden.device:
                hidden, rotary = hidden.to(block.device), (rotary[0].to(block.device), rotary[1].to(block.device))
                # Queries, keys and values, each [heads, patches, head_dim].
                heads = hidden.new_empty((3, block.num_heads, total, width // block.num_heads))
                attended = torch.empty_like(hidden)
            for rows in _cut(0, total, block.qkv.size, largest):
                yield (rows.stop - rows.start) * block.qkv.size
                joined = block.qkv(block.norm1(hidden[rows]), adapted).view(-1, 3 * block.num_heads, heads.shape[-1])
                both = joined[:, : 2 * block.num_heads].float()
                rotated = self._kernels.apply_rotary(both, rotary[0][rows], rotary[1][rows])
                heads.view(-1, total, heads.shape[-1])[: 2 * block.num_heads, rows] = rotated.transpose(0, 1)
                heads[2, :, rows] = joined[:, 2 * block.num_heads :].transpose(0, 1)
            for first, last in pairwise([0, *self._ends(index, pictures)]):
                cost = 2 * (last - first) * width
                keys, values = heads[1:2, :, first:last], heads[2:3, :, first:last]
                for rows in _cut(first, last, cost, largest):
                    yield (rows.stop - rows.start) * cost
                    out = self._kernels.attention(heads[:1, :, rows], keys, values)
                    attended[rows] = out[0].transpose(0, 1).reshape(-1, width)
            for rows in _cut(0, total, block.rest, largest):
                yield (rows.stop - rows.start) * block.rest
                hidden[rows] = block.finish(hidden[rows], attended[rows], adapted)
            if index in self._deep:
                merged.append((yield from self._merge(self._deep[index], hidden, largest, adapted)))
        merged.insert(0, (yield from self._merge(self._merger, hidden, largest, adapted)))
        features = self._in_rows(pictures, torch.stack([part.to(merged[0].device) for part in merged]))
        counts = [picture.num_tokens for picture in pictures]
        return [part.clone() for part in torch.split_with_sizes(features, counts, dim=1)]

    def _in_order(
        self, pictures: list[PreparedPicture], hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return patches and their rotations in the order in which the blocks compute them."""
        return hidden, rotary

    def _in_rows(self, pictures: list[PreparedPicture], features: Tensor) -> Tensor:
        """Return features [layers, tokens, hidden] in the order of the prompt's tokens again."""
        return features

    def _ends(self, block: int, pictures: list[PreparedPicture]) -> list[int]:
        """Return behind which patches attention ends in a block: each picture attends to itself."""
        return list(accumulate(picture.grid[0] * picture.grid[1] for picture in pictures))

    def _merge(
        self, merger: Merger, hidden: Tensor, largest: float, adapted: Sequence[AdapterRows]
    ) -> Generator[float, None, Tensor]:
        import torch

        square = self._rules.merge_size**2
        parts = []
        for rows in _cut(0, hidden.shape[0] // square, merger.size, largest):
            yield (rows.stop - rows.start) * merger.size
            parts.append(merger(hidden[rows.start * square : rows.stop * square], adapted))
        return torch.cat(parts)

    def patches(self, pixels: NDArray[np.uint8] | None) -> Tensor:
        """Return normalised patches, float32 [patches, 3 * patch * patch], with those of a merged square in a row.

        Of two frames they are [patches, 3 * 2 * patch * patch].
        """
        import torch

        if pixels is None:
            raise RuntimeError("a picture has neither pixels nor features")
        if pixels.ndim == 4:
            frames = [self.patches(frame) for frame in pixels]
            return torch.stack([frame.view(len(frame), 3, -1) for frame in frames], 2).flatten(1)
        rules, device = self._rules, self._device
        size, merge = rules.patch_size, rules.merge_size
        image = torch.from_numpy(pixels).to(device).permute(2, 0, 1).float()
        mean = torch.tensor(rules.mean, device=device).view(3, 1, 1)
        std = torch.tensor(rules.std, device=device).view(3, 1, 1)
        image = (image * (1 / 255) - mean) / std
        rows, columns = image.shape[1] // size, image.shape[2] // size
        cut = image.view(3, rows // merge, merge, size, columns // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        return cut.reshape(rows * columns, 3 * size * size)

    def _embedded(self, picture: PreparedPicture, largest: float) -> Generator[float, None, list[Tensor]]:
        """Return, in pieces as of `pieces`, patch plus position embeddings, [patches, hidden] together."""
        embedding = self._places(picture)
        patches = self.patches(picture.pixels).to(self._dtype)
        parts = []
        embed = self._embed_frames if picture.video else self._embed
        for rows in _cut(0, len(patches), embed.size, largest):
            yield (rows.stop - rows.start) * embed.size
            embedded = embed(patches[rows])
            parts.append(embedded if embedding is None else embedded + embedding[rows])
        return parts

    def _places(self, picture: PreparedPicture) -> Tensor | None:
        """Return the interpolated position embeddings [patches, hidden], or None where a model has none."""
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
        return embedding.to(table.dtype)

    def _rotary(self, pictures: list[PreparedPicture]) -> tuple[Tensor, Tensor]:
        """Return float32 rotary cosines and sines by patch row (first half of the frequencies) and column."""
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
        """Return the values `grid` of patches [rows, columns] flattened in the order of `patches`: by merged square."""
        merge = self._rules.merge_size
        rows, columns = grid.shape
        return grid.reshape(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten()


def _cut(first: int, last: int, cost: int, largest: float) -> list[slice]:
    """Return the rows first:last, each of which costs `cost`, in equal pieces that do not cost more than `largest`."""
    fit = last - first if largest == float("inf") else max(1, int(largest // cost))
    size = -(-(last - first) // -(-(last - first) // fit))
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


class Block:
    """The weights of one block of the tower. `rest` is the number of weights after the attention."""

    def __init__(self, block: Qwen3VLVisionBlock, plan: LinearPlan) -> None:
        attention = block.attn
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.device = block.norm1.weight.device
        self.num_heads: int = attention.num_heads
        self.qkv = plan.join((attention.qkv,))
        self._proj = plan.join((attention.proj,))
        self._read_mlp(block.mlp, plan)
        self.rest = self._proj.size + self._up.size + self._down.size

    def _read_mlp(self, mlp: Qwen3VLVisionMLP, plan: LinearPlan) -> None:
        self._up, self._down = plan.join((mlp.linear_fc1,)), plan.join((mlp.linear_fc2,))
        self._act: nn.Module = mlp.act_fn

    def _widened(self, normed: Tensor, adapted: Sequence[AdapterRows]) -> Tensor:
        return _activated(self._up, normed, self._act, adapted)

    def finish(self, hidden: Tensor, attended: Tensor, adapted: Sequence[AdapterRows]) -> Tensor:
        hidden = self._proj.added_to(hidden, attended, adapted)
        return self._down.added_to(hidden, self._widened(self.norm2(hidden), adapted), adapted)


class Merger:
    """The patch merger: merges squares of patches into tokens of the text model."""

    def __init__(
        self, norm: nn.Module, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear, plan: LinearPlan, *, after_merging: bool
    ) -> None:
        self._norm = norm
        self._after_merging = after_merging
        self._width = fc1.in_features
        self._device = fc1.weight.device
        self._fc1, self._fc2 = plan.join((fc1,)), plan.join((fc2,))
        self._act = act
        self.size = self._fc1.size + self._fc2.size

    def __call__(self, hidden: Tensor, adapted: Sequence[AdapterRows]) -> Tensor:
        hidden = hidden.to(self._device)
        normed = self._norm(hidden.view(-1, self._width) if self._after_merging else hidden).view(-1, self._width)
        return self._fc2(_activated(self._fc1, normed, self._act, adapted), adapted)


def _merger(merger: Qwen3VLVisionPatchMerger, plan: LinearPlan, *, after_merging: bool) -> Merger:
    return Merger(merger.norm, merger.linear_fc1, merger.act_fn, merger.linear_fc2, plan, after_merging=after_merging)


def _activated(linear: Linear, x: Tensor, act: nn.Module, adapted: Sequence[AdapterRows]) -> Tensor:
    """Return act(linear(x, adapted)), fused into the matrix product where `act` is a GELU."""
    approximate = GELU.get(type(act).__name__)
    if approximate is None:
        activated: Tensor = act(linear(x, adapted))
        return activated
    return linear.gelu(x, approximate, adapted)


def _patch_embedding(convolution: nn.Conv3d, plan: LinearPlan, *, moving: bool) -> Linear:
    weight = convolution.weight.detach()  # [hidden, 3, frames, patch, patch]
    summed = weight if moving else weight.float().sum(2).to(weight.dtype)
    flat = summed.reshape(weight.shape[0], -1)
    return plan.linear(flat, None if convolution.bias is None else convolution.bias.detach())
