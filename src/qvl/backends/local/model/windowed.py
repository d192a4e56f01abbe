"""Qwen2.5-VL's parts: a decoder without norms of heads, and a picture tower whose blocks attend within windows."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from qvl.backends.local.model.decoder import Layer, TextDecoder
from qvl.backends.local.model.decoder_step import LayerStep
from qvl.backends.local.model.vision import Block, Merger, VisionTower
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PretrainedConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel as VisionModel,
    )
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VLDecoderLayer,
        Qwen2_5_VLMLP,
        Qwen2_5_VLTextModel,
        Qwen2_5_VLVisionBlock,
    )

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import AdapterRows, LinearPlan
    from qvl.backends.local.text.processor import ImageRules, PreparedPicture


class SectionDecoder(TextDecoder):
    """Qwen2.5-VL's decoder layers; arguments as of `TextDecoder`. Its query, key and value projections have biases.

    Raises:
        ConfigError: some of its layers attend within a sliding window.
    """

    def __init__(
        self,
        model: Qwen2_5_VLTextModel,
        lm_head: nn.Linear,
        kernels: Kernels,
        plan: LinearPlan,
        *,
        batch_invariant: bool = False,
    ) -> None:
        if getattr(model.config, "use_sliding_window", False):
            hint = "serve it with another server and use 'openai:…'"
            raise ConfigError("the model attends within a sliding window, which is not supported", hint=hint)
        super().__init__(model, lm_head, kernels, plan, batch_invariant=batch_invariant)

    def _axes_of(self, count: int) -> Tensor:
        """Return which axis each of `count` frequencies belongs to: a section for each, one behind the other."""
        import torch

        sections = torch.tensor(self._sections)
        if int(sections.sum()) != count:
            raise ValueError(f"the sections {self._sections} are not those of {count} frequencies")
        return torch.arange(3).repeat_interleave(sections)

    @property
    def _sections(self) -> list[int]:
        config = self._rotary.config
        rope = getattr(config, "rope_parameters", None) or config.rope_scaling
        return list(rope["mrope_section"])

    def _layer(self, layer: Qwen2_5_VLDecoderLayer, index: int, *, config: PretrainedConfig, plan: LinearPlan) -> Layer:
        return SectionLayer(layer, index, config, plan, self.batch_invariant)

    def _mixed(self, layer: Layer, normed: Tensor, step: LayerStep) -> Tensor:
        heads = self.num_heads + self.num_kv_heads
        joined = layer.qkv(normed, step.adapted).view(-1, heads + self.num_kv_heads, self.head_dim)
        rotated = self._kernels.apply_rotary(joined[:, :heads], step.cos, step.sin)
        return self._attend(rotated[:, : self.num_heads], rotated[:, self.num_heads :], joined[:, heads:], step)


class SectionLayer(Layer):
    """The weights of a layer of Qwen2.5-VL."""

    def join_mixing(self, layer: Qwen2_5_VLDecoderLayer, index: int, plan: LinearPlan, tiled: bool) -> int:
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = plan.join(projections, name=f"{index}.qkv", tiled=tiled)
        self.output = plan.join((attention.o_proj,), name=f"{index}.output", tiled=tiled)
        return self.qkv.size + self.output.size


class WindowedTower(VisionTower):
    """Qwen2.5-VL's vision tower: patches lie in the order of windows, within which all but a few blocks attend."""

    def __init__(self, visual: VisionModel, rules: ImageRules, kernels: Kernels, plan: LinearPlan) -> None:
        super().__init__(visual, rules, kernels, plan)
        self._whole: frozenset[int] = frozenset(visual.fullatt_block_indexes)
        # Squares of patches along a window.
        self._side: int = visual.window_size // rules.merge_size // rules.patch_size

    def _block(self, block: Qwen2_5_VLVisionBlock, plan: LinearPlan) -> Block:
        return GatedBlock(block, plan, self._kernels)

    def _read_ends(self, visual: VisionModel, plan: LinearPlan) -> None:
        merger = visual.merger
        self._merger = Merger(merger.ln_q, merger.mlp[0], merger.mlp[1], merger.mlp[2], plan, after_merging=False)
        self._deep = {}

    def _places(self, picture: PreparedPicture) -> Tensor | None:
        return None

    def _in_order(
        self, pictures: list[PreparedPicture], hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        import torch

        square = self._rules.merge_size**2
        order = (self._order(pictures)[:, None] * square + torch.arange(square)).flatten().to(hidden.device)
        return hidden[order], (rotary[0][order], rotary[1][order])

    def _in_rows(self, pictures: list[PreparedPicture], features: Tensor) -> Tensor:
        return features[:, self._order(pictures).argsort().to(features.device)]

    def _ends(self, block: int, pictures: list[PreparedPicture]) -> list[int]:
        if block in self._whole:
            return super()._ends(block, pictures)
        square = self._rules.merge_size**2
        return list(accumulate(square * size for picture in pictures for size in self._sizes(picture)))

    def _pairs(self, picture: PreparedPicture) -> int:
        whole = sum(block in self._whole for block in range(len(self._blocks)))
        within = sum((size * self._rules.merge_size**2) ** 2 for size in self._sizes(picture))
        return whole * (picture.grid[0] * picture.grid[1]) ** 2 + (len(self._blocks) - whole) * within

    def _squares(self, picture: PreparedPicture) -> tuple[int, int]:
        rows, columns = picture.grid
        return rows // self._rules.merge_size, columns // self._rules.merge_size

    def _sizes(self, picture: PreparedPicture) -> list[int]:
        """Return how many squares each window has, row by row; those at the right and lower edge may have fewer."""
        down, across = (
            [min(self._side, count - start) for start in range(0, count, self._side)]
            for count in self._squares(picture)
        )
        return [height * width for height in down for width in across]

    def _order(self, pictures: list[PreparedPicture]) -> Tensor:
        """Return the squares of all pictures, window by window, int64."""
        import torch

        parts, first = [], 0
        for picture in pictures:
            rows, columns = self._squares(picture)
            row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
            window = row // self._side * -(-columns // self._side) + column // self._side
            parts.append(first + window.flatten().argsort(stable=True))
            first += rows * columns
        return torch.cat(parts)


class GatedBlock(Block):
    """The weights of a block of Qwen2.5-VL's tower, whose second half has a gate."""

    def __init__(self, block: Qwen2_5_VLVisionBlock, plan: LinearPlan, kernels: Kernels) -> None:
        self._kernels = kernels
        super().__init__(block, plan)

    def _read_mlp(self, mlp: Qwen2_5_VLMLP, plan: LinearPlan) -> None:
        self._up, self._down = plan.join((mlp.gate_proj, mlp.up_proj)), plan.join((mlp.down_proj,))

    def _widened(self, normed: Tensor, adapted: Sequence[AdapterRows]) -> Tensor:
        return self._kernels.swiglu(self._up(normed, adapted))
