"""The text model's forward pass over a running batch, with transformers' weights.

All tokens of a step, one per decoding sequence and the chunks of prompts, pass the linear layers as one packed
[tokens, hidden] matrix, so weights are read once a step; only attention looks at sequences one by one (prompts) or a
pool at a time (decode). Query, key and value weights are joined, so are gate and up; the modules' own parameters become
views of the joined ones, or empty, so no memory is doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from qvl.backends.local.model.attention_times import Heads
from qvl.backends.local.model.decoder_step import (
    NO_ADAPTERS,
    DecodeGroup,
    Deepstack,
    LayerStep,
    PromptChunk,
    StepAdapters,
)
from qvl.backends.local.model.kv_storage import Layout, Storage
from qvl.backends.local.model.shared_rows import SharedRow, add_shared, attention_with_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextModel

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import Linear, LinearPlan


class TextDecoder:
    """The forward pass of Qwen3-VL's decoder layers.

    Args:
        model: transformers' text model; its parameters become views of the joined ones.
        lm_head: the output projection.
        kernels: the device's operators.
        plan: makes the matrix products.
        batch_invariant: compute every token as it would be computed alone.
    """

    def __init__(
        self,
        model: Qwen3VLTextModel,
        lm_head: nn.Linear,
        kernels: Kernels,
        plan: LinearPlan,
        *,
        batch_invariant: bool = False,
    ) -> None:
        import torch

        self.batch_invariant = batch_invariant
        self._kernels = kernels
        config = model.config
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        self.embed: nn.Embedding = model.embed_tokens
        self.norm: Tensor = model.norm.weight
        self.dtype = self.norm.dtype
        self.vocab_size = int(lm_head.weight.shape[0])
        self._head = plan.linear(lm_head.weight.detach(), name="head", tiled=batch_invariant)
        self._head_device = lm_head.weight.device
        heads = Heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if not batch_invariant:
            kernels.choose_attention(heads, self.dtype, decodes=True)
        self._widens = kernels.widens(heads)
        # The first layer may measure kernels, which wants the processor for itself; some of their layouts are made by
        # one thread each, so the other layers are made side by side.
        make, count = partial(self._layer, config=config, plan=plan), len(model.layers)
        self.layers = [make(model.layers[0], 0)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            self.layers += pool.map(make, list(model.layers)[1:], range(1, count))
        self._rotary = model.rotary_emb
        self._axes: Tensor | None = None

    def layout(self) -> Layout:
        return Layout(
            devices=[layer.device for layer in self.layers],
            num_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

    @property
    def cost(self) -> int:
        """Return the number of multiplications with weights for one token."""
        return sum(layer.cost for layer in self.layers)

    @property
    def key_cost(self) -> int:
        """Return the number of multiplications of one token's attention to one earlier token."""
        return 2 * len(self.layers) * self.num_heads * self.head_dim

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine for `Kernels.apply_rotary` of int64 positions [3, tokens]."""
        import torch

        frequencies: Tensor = self._rotary.inv_freq
        if self._axes is None or self._axes.device != positions.device:
            self._axes = self._axes_of(len(frequencies)).to(positions.device)
        angles = positions.float().index_select(0, self._axes).t() * frequencies.to(positions.device, torch.float32)
        return self._kernels.rotary_cos_sin(angles, self.dtype, self._rotary.attention_scaling)

    def _axes_of(self, count: int) -> Tensor:
        """Return which axis each of `count` frequencies belongs to, int64.

        Frequency i belongs to height when i % 3 == 1 and to width when i % 3 == 2, as far as their sections reach, else
        to time (Qwen3-VL's interleaved mrope).
        """
        import torch

        axes = torch.zeros(count, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : self._rotary.mrope_section[axis] * 3 : 3] = axis
        return axes

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        storage: Storage,
        groups: Sequence[DecodeGroup],
        chunks: Sequence[PromptChunk],
        deepstack: Deepstack | None,
        kept: Tensor | None = None,
        shared: Sequence[SharedRow] = (),
        states: Tensor | None = None,
        adapted: StepAdapters = NO_ADAPTERS,
    ) -> Tensor:
        """Write keys and values of all tokens to `storage`; return hidden states [n, hidden], not normalised.

        `shared` are the rows that tokens attend to beside those of their groups and chunks. `kept` (int64 [n]) selects
        the tokens whose hidden states are returned, all by default; for the others, the last layer computes keys and
        values only. `states` (int64 [2, decoding sequences]) are the states before and behind the tokens in decode,
        where the model has any. `adapted` are the tokens that adapters change.
        """
        cos, sin = rotary
        device = hidden.device
        masks = self._masks(groups, chunks, device)
        # Where pictures reach into the last layer, all tokens pass it.
        last = len(self.layers) - 1 if deepstack is None or len(deepstack.features) < len(self.layers) else None
        for index, layer in enumerate(self.layers):
            if layer.device != device:
                device = layer.device
                hidden, cos, sin = hidden.to(device), cos.to(device), sin.to(device)
                groups = [group.to(device) for group in groups]
                masks = self._masks(groups, chunks, device)
                states = None if states is None else states.to(device)
                adapted = adapted.to(device)
            rows = adapted.all
            step = LayerStep(storage, layer.place, groups, chunks, masks, cos, sin, shared, states, rows)
            attended = self._mixed(layer, self._normed(hidden, layer.input_norm), step)
            if index == last:
                hidden, attended, rows = _of(hidden, kept), _of(attended, kept), adapted.kept
                if not len(hidden):
                    return hidden
            hidden = layer.output.added_to(hidden, attended, rows)
            normed = self._normed(hidden, layer.mlp_norm)
            if layer.gate_up is None or layer.down is None:
                hidden = hidden + self._mixture(layer, normed).view_as(hidden)
            else:
                hidden = layer.down.added_to(hidden, self._kernels.swiglu(layer.gate_up(normed, rows)), rows)
            if deepstack is not None and index < len(deepstack.features):
                where, features = deepstack.where.to(device), deepstack.features[index].to(device, hidden.dtype)
                hidden = hidden.index_add(0, where, features)
        return hidden if last is not None else _of(hidden, kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [n, vocabulary] of hidden states [n, hidden]."""
        normed = self._normed(hidden.to(self.norm.device), self.norm)
        return self._head(normed.to(self._head_device)).float()

    def _layer(
        self, layer: Qwen3VLTextDecoderLayer, index: int, *, config: PretrainedConfig, plan: LinearPlan
    ) -> Layer:
        return Layer(layer, index, config, plan, self.batch_invariant)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x after root mean square normalisation over the last dimension, times `weight`."""
        return self._kernels.rms_norm(x, weight, self.eps)

    def _mixed(self, layer: Layer, normed: Tensor, step: LayerStep) -> Tensor:
        """Return what a layer takes from other tokens for each, [tokens, heads * head_dim]: here attention."""
        heads = self.num_heads + self.num_kv_heads
        joined = layer.qkv(normed, step.adapted).view(-1, heads + self.num_kv_heads, self.head_dim)
        rotated = self._kernels.rms_norm(joined[:, :heads], None, self.eps) * layer.qk_norm
        rotated = self._kernels.apply_rotary(rotated, step.cos, step.sin)
        return self._attend(rotated[:, : self.num_heads], rotated[:, self.num_heads :], joined[:, heads:], step)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, step: LayerStep) -> Tensor:
        """Return the attention output [tokens, heads * head_dim]; writes keys and values to their KV rows first."""
        import torch

        sums = queries.new_empty((len(queries), self.num_heads), dtype=torch.float32) if step.shared else None
        parts = []
        pools, place, groups = step.storage.pools, step.place, step.groups
        for group, mask in zip(groups, step.masks, strict=False):
            own = pools[group.capacity][place]
            parts.append(self._decode(queries, keys, values, *own, group, mask, sums if group.shared else None))
        for chunk, mask in zip(step.chunks, step.masks[len(groups) :], strict=True):
            own = pools[chunk.capacity][place]
            parts.append(self._prompt(queries, keys, values, *own, chunk, mask, sums if chunk.shared else None))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        # Last, since a shared row may be written in this very step.
        for row in step.shared:
            assert sums is not None
            key, value = (pool[row.row, :, : row.tokens] for pool in pools[row.capacity][place])
            add_shared(out, sums, queries, key, value, row.where, widens=self._widens)
        return out

    def _masks(
        self, groups: Sequence[DecodeGroup], chunks: Sequence[PromptChunk], device: torch.device
    ) -> list[Tensor | None]:
        """Return the mask of each group and chunk; made once a step and device, else every layer would make it."""
        masks = [group.mask(self.dtype) for group in groups]
        for chunk in chunks:
            later = chunk.start > 0 and chunk.count > 1 and not self.batch_invariant
            made = self._kernels.causal_mask(chunk.count, chunk.end, self.dtype, device) if later else None
            masks.append(made)
        return masks

    def _decode(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        group: DecodeGroup,
        mask: Tensor | None,
        sums: Tensor | None,
    ) -> Tensor:
        """Return the attention of a group to its own rows, [count, heads * head_dim]; fills in its `sums` if given."""
        part = slice(group.first, group.first + group.count)
        k_pool.view(-1, self.head_dim).index_copy_(0, group.write, keys[part].reshape(-1, self.head_dim))
        v_pool.view(-1, self.head_dim).index_copy_(0, group.write, values[part].reshape(-1, self.head_dim))
        # The queries that share a key head stand as several "positions" of it: grouped attention without a copy.
        query = queries[part].reshape(group.count, self.num_kv_heads, -1, self.head_dim)
        if group.rows is not None:
            padded = query.new_zeros((group.num_rows, *query.shape[1:]))
            query = padded.index_copy_(0, group.rows, query)
        rows = slice(group.first_row, group.first_row + group.num_rows)
        key, value = k_pool[rows, :, : group.longest], v_pool[rows, :, : group.longest]
        if sums is not None:
            out, found = attention_with_sums(query, key, value, mask)
            sums[part] = found.reshape(group.count, -1)
            return out.reshape(group.count, -1)
        out = self._kernels.decode_attention(query, key, value, mask, group.capacity)
        if group.rows is not None:
            out = out.index_select(0, group.rows)
        return out.reshape(group.count, -1)

    def _prompt(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        chunk: PromptChunk,
        mask: Tensor | None,
        sums: Tensor | None,
    ) -> Tensor:
        part = slice(chunk.first, chunk.first + chunk.count)
        end = chunk.end
        k_row, v_row = k_pool[chunk.row], v_pool[chunk.row]
        k_row[:, chunk.start : end] = keys[part].transpose(0, 1)
        v_row[:, chunk.start : end] = values[part].transpose(0, 1)
        if self.batch_invariant:
            return self._one_by_one(queries[part], k_row, v_row, chunk.start)
        query = queries[part].transpose(0, 1).unsqueeze(0)
        if sums is not None:
            causal = mask is None and chunk.count > 1
            key, value = k_row[None, :, :end], v_row[None, :, :end]
            out, found = attention_with_sums(query, key, value, mask, causal=causal, widens=self._widens)
            sums[part] = found[0].t()
            return out[0].transpose(0, 1).reshape(chunk.count, -1)
        out = self._kernels.causal_attention(query, k_row[None, :, :end], v_row[None, :, :end], mask)
        return out[0].transpose(0, 1).reshape(chunk.count, -1)

    def _one_by_one(self, queries: Tensor, k_row: Tensor, v_row: Tensor, start: int) -> Tensor:
        """Return the attention of tokens from position `start` on, one call a token, shaped by its position alone."""
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        parts = []
        for offset, query in enumerate(queries.reshape(len(queries), 1, self.num_kv_heads, -1, self.head_dim)):
            end = start + offset + 1
            parts.append(F.scaled_dot_product_attention(query, k_row[None, :, :end], v_row[None, :, :end]))
        return torch.cat(parts).reshape(len(parts), -1)

    def _mixture(self, layer: Layer, normed: Tensor) -> Tensor:
        import torch

        # How many tokens an expert gets depends on all of them.
        rows = torch.split(normed, 1) if self.batch_invariant else (normed,)
        return torch.cat([layer.mlp(row.unsqueeze(0))[0].view(len(row), -1) for row in rows])


class Layer:
    """The weights of one decoder layer, joined where one matrix product can serve several.

    `place` is its number among the layers that keep the same kind of memory of tokens: here all.
    """

    qkv: Linear
    output: Linear
    qk_norm: Tensor

    def __init__(
        self, layer: Qwen3VLTextDecoderLayer, index: int, config: PretrainedConfig, plan: LinearPlan, tiled: bool
    ) -> None:
        self.place = index
        self.input_norm = self.norm_weight(layer.input_layernorm)
        self.mlp_norm = self.norm_weight(layer.post_attention_layernorm)
        self.device = self.input_norm.device
        mlp = self.mlp = layer.mlp
        dense = hasattr(mlp, "gate_proj") and getattr(config, "hidden_act", "silu") == "silu"
        self.gate_up = plan.join((mlp.gate_proj, mlp.up_proj), name=f"{index}.gate_up", tiled=tiled) if dense else None
        self.down = plan.join((mlp.down_proj,), name=f"{index}.down", tiled=tiled) if dense else None
        if self.gate_up is not None and self.down is not None:
            of_mlp = self.gate_up.size + self.down.size
        else:
            of_mlp = sum(parameter.numel() for parameter in mlp.parameters())
            # Of a mixture only the chosen experts work.
            of_mlp = of_mlp * getattr(config, "num_experts_per_tok", 1) // getattr(config, "num_experts", 1)
        self.cost = self.join_mixing(layer, index, plan, tiled) + of_mlp

    def norm_weight(self, norm: nn.Module) -> Tensor:
        """Return what a normalised vector is multiplied with."""
        import torch

        weight = norm.weight
        # No Parameter where a device has tensors of its own kind.
        assert isinstance(weight, torch.Tensor)
        return weight

    def join_mixing(self, layer: Qwen3VLTextDecoderLayer, index: int, plan: LinearPlan, tiled: bool) -> int:
        """Join the weights of what looks at other tokens; return how many there are."""
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = (attention.q_norm, attention.k_norm)
        self.qkv = plan.join(projections, name=f"{index}.qkv", tiled=tiled)
        self.output = plan.join((attention.o_proj,), name=f"{index}.output", tiled=tiled)
        self.qk_norm = self.head_norms(norms, [part.out_features // attention.head_dim for part in projections[:2]])
        return self.qkv.size + self.output.size

    def head_norms(self, norms: Sequence[nn.Module], counts: Sequence[int]) -> Tensor:
        """Return the norms' weights as often as there are heads, [heads, head_dim]: one product serves them all."""
        import torch

        weights = [self.norm_weight(norm).expand(count, -1) for norm, count in zip(norms, counts, strict=True)]
        return torch.cat(weights)


def _of(hidden: Tensor, kept: Tensor | None) -> Tensor:
    return hidden if kept is None else hidden.index_select(0, kept.to(hidden.device))
