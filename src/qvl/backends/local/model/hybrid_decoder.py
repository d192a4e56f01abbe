"""The forward pass of Qwen3.5's text model: three layers of four are gated delta rules, the fourth is attention."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qvl.backends.local.model.decoder import Layer, TextDecoder
from qvl.backends.local.model.decoder_step import LayerStep
from qvl.backends.local.model.gated_delta import GatedDelta
from qvl.backends.local.model.kv_storage import Layout

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5TextModel

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import LinearPlan

LINEAR = "linear_attention"


class HybridDecoder(TextDecoder):
    """Qwen3.5's decoder layers; arguments as of `TextDecoder`.

    Unlike Qwen3-VL's, norms multiply with 1 + their weight, only the first part of a head is rotated, and a gate
    closes the output of attention.
    """

    def __init__(
        self,
        model: Qwen3_5TextModel,
        lm_head: nn.Linear,
        kernels: Kernels,
        plan: LinearPlan,
        *,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(model, lm_head, kernels, plan, batch_invariant=batch_invariant)
        self.norm = 1 + self.norm.float()

    def layout(self) -> Layout:
        """Return the shapes of the attention layers' keys and values, and of the other layers' states."""
        return Layout(
            devices=[layer.device for layer in self.layers if _delta(layer) is None],
            num_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            states=[(layer.device, delta.shape) for layer in self.layers if (delta := _delta(layer)) is not None],
        )

    @property
    def key_cost(self) -> int:
        return super().key_cost * len(self.layout().devices) // len(self.layers)

    def _layer(self, layer: Qwen3_5DecoderLayer, index: int, *, config: PretrainedConfig, plan: LinearPlan) -> Layer:
        return HybridLayer(layer, index, config, plan, self.batch_invariant, self._kernels)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.rms_norm(x.float(), weight, self.eps).to(x.dtype)

    def _mixed(self, layer: Layer, normed: Tensor, step: LayerStep) -> Tensor:
        delta = _delta(layer)
        return self._attended(layer, normed, step) if delta is None else self._recalled(delta, normed, step)

    def _attended(self, layer: Layer, normed: Tensor, step: LayerStep) -> Tensor:
        """Return the attention layers' output, times its gate."""
        import torch

        queries, keys = self.num_heads, self.num_heads + self.num_kv_heads
        joined = layer.qkv(normed, step.adapted).view(len(normed), -1, self.head_dim)
        gate = joined[:, keys + self.num_kv_heads :].reshape(len(normed), -1)
        both = self._kernels.rms_norm(joined[:, :keys].float(), None, self.eps) * layer.qk_norm
        both = both.to(joined.dtype)
        turned = step.cos.shape[-1]
        rotated = self._kernels.apply_rotary(both[..., :turned], step.cos, step.sin)
        both = torch.cat((rotated, both[..., turned:]), -1)
        attended = self._attend(both[:, :queries], both[:, queries:], joined[:, keys : keys + self.num_kv_heads], step)
        return attended * gate.sigmoid()

    def _recalled(self, delta: GatedDelta, normed: Tensor, step: LayerStep) -> Tensor:
        """Return the output of the gated delta rule; writes the states behind the tokens."""
        import torch

        taps, memory = step.storage.states[step.place]
        projected = delta.project(normed, step.adapted)
        parts = []
        if step.states is not None and step.states.numel():
            read, write = step.states
            parts.append(delta.decode(projected[: len(read)], taps, memory, read, write))
        for chunk in step.chunks:
            done, read = 0, chunk.read
            for end, write in (*chunk.marks, (chunk.count, chunk.write)):
                part = projected[chunk.first + done : chunk.first + end]
                if len(part):
                    parts.append(delta.prompt(part, taps, memory, read, write, one_by_one=self.batch_invariant))
                else:
                    # A mark at the end of the chunk.
                    taps[write], memory[write] = taps[read], memory[read]
                done, read = end, write
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class HybridLayer(Layer):
    """The weights of a layer of Qwen3.5; `delta` is None where it is attention."""

    def __init__(
        self,
        layer: Qwen3_5DecoderLayer,
        index: int,
        config: PretrainedConfig,
        plan: LinearPlan,
        tiled: bool,
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        self.delta: GatedDelta | None = None
        super().__init__(layer, index, config, plan, tiled)
        kinds = config.layer_types
        self.place = kinds[:index].count(kinds[index])

    def norm_weight(self, norm: nn.Module) -> Tensor:
        return 1 + super().norm_weight(norm).float()

    def join_mixing(self, layer: Qwen3_5DecoderLayer, index: int, plan: LinearPlan, tiled: bool) -> int:
        if hasattr(layer, "linear_attn"):
            self.delta = GatedDelta(layer.linear_attn, index, self._kernels, plan, tiled=tiled)
            self.output = plan.join((layer.linear_attn.out_proj,), name=f"{index}.output", tiled=tiled)
            return self.delta.projected.size + self.output.size
        attention = layer.self_attn
        query, gate = _halves(attention.q_proj, attention.head_dim)
        projections = (query, attention.k_proj, attention.v_proj, gate)
        norms = (attention.q_norm, attention.k_norm)
        self.qkv = plan.join(projections, name=f"{index}.qkv", tiled=tiled)
        halves = [(part, rows) for part, rows in zip((query, gate), _half_rows(query, attention.head_dim), strict=True)]
        plan.parts[attention.q_proj] = [replace(plan.parts.pop(part)[0], rows=rows) for part, rows in halves]
        self.output = plan.join((attention.o_proj,), name=f"{index}.output", tiled=tiled)
        self.qk_norm = self.head_norms(norms, [part.out_features // attention.head_dim for part in projections[:2]])
        return self.qkv.size + self.output.size


def _delta(layer: Layer) -> GatedDelta | None:
    return layer.delta if isinstance(layer, HybridLayer) else None


def _half_rows(half: nn.Linear, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return which outputs of the projection in the checkpoint are the queries', and which the gates'."""
    import torch

    rows = torch.arange(2 * half.out_features).view(-1, 2, head_dim)
    return rows[:, 0].flatten(), rows[:, 1].flatten()


def _halves(projection: nn.Linear, head_dim: int) -> tuple[nn.Linear, nn.Linear]:
    """Return the projection of the queries and that of the gates, which alternate by head; `projection` is emptied."""
    import torch

    parts = []
    size = projection.out_features // 2
    for half in (0, 1):
        part = torch.nn.Linear(projection.in_features, size, bias=projection.bias is not None, device="meta")
        for name, values in projection.named_parameters():
            rows = values.detach().view(-1, 2, head_dim, *values.shape[1:])[:, half].flatten(0, 1)
            setattr(part, name, torch.nn.Parameter(rows, requires_grad=False))
        parts.append(part)
    projection.weight = torch.nn.Parameter(projection.weight.new_empty(0), requires_grad=False)
    return parts[0], parts[1]
