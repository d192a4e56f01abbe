"""The gated delta rule: attention whose memory is one matrix a head, whatever the length of the text.

Each token lets the matrix fade, reads what it holds under the token's key, and writes the difference to the token's
value there (Yang et al., "Gated Delta Networks", 2024). A short causal convolution stands before it. What a sequence
carries from token to token, its state, are that matrix and the inputs of the convolution's last taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import AdapterRows, LinearPlan

# Tokens of a prompt that are computed by matrix products at a time.
CHUNK: Final = 64
NORM_EPS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class StateShape:
    """The shape of one sequence's state in one layer: taps [taps, channels] and memory [heads, key_dim, value_dim]."""

    taps: int
    channels: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.taps * self.channels * self.dtype.itemsize + 4 * self.heads * self.key_dim * self.value_dim


class GatedDelta:
    """One layer of it: its weights, and what it computes of tokens between two residual additions.

    Args:
        module: transformers' module; its projections become views of the joined ones, or empty.
        index: number of the layer.
        tiled: as of `LinearPlan.linear`.
    """

    def __init__(
        self, module: Qwen3_5GatedDeltaNet, index: int, kernels: Kernels, plan: LinearPlan, *, tiled: bool
    ) -> None:
        parts = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
        self._kernels = kernels
        self._heads: int = module.num_v_heads
        self._shared: int = module.num_v_heads // module.num_k_heads
        self._sizes = [module.key_dim * 2 + module.value_dim, module.value_dim, self._heads, self._heads]
        self._widths = [module.key_dim, module.key_dim, module.value_dim]
        self._key_dim: int = module.head_k_dim
        self._value_dim: int = module.head_v_dim
        self.projected = plan.join(parts, name=f"{index}.delta", tiled=tiled)
        weight = module.conv1d.weight.detach()
        self._taps = weight[:, 0].t().contiguous()  # [taps, channels]
        self._bias: Tensor | None = None if module.conv1d.bias is None else module.conv1d.bias.detach()
        self._rate = -module.A_log.detach().float().exp()
        self._shift: Tensor = module.dt_bias.detach()
        self._norm: Tensor = module.norm.weight.detach()
        self._eps: float = module.norm.variance_epsilon
        self.shape = StateShape(
            len(self._taps) - 1, weight.shape[0], self._heads, self._key_dim, self._value_dim, weight.dtype
        )

    def project(self, normed: Tensor, adapted: Sequence[AdapterRows] = ()) -> Tensor:
        """Return what `decode` and `prompt` take, [n, any], of all tokens of a step, normed [n, hidden]."""
        return self.projected(normed, adapted)

    def decode(self, projected: Tensor, taps: Tensor, memory: Tensor, read: Tensor, write: Tensor) -> Tensor:
        """Return [n, heads * value_dim] for the next token of n sequences, of which `project` made `projected`.

        Args:
            taps: the states' taps, [states, taps, channels].
            memory: the states' memory, float32 [states, heads, key_dim, value_dim].
            read: int64 [n], each sequence's state before the token.
            write: int64 [n], where its state behind the token goes; none of them is read.
        """
        import torch

        mixed, gate, beta, rate = torch.split(projected, self._sizes, -1)
        window = torch.cat((taps.index_select(0, read), mixed.unsqueeze(1)), 1)
        taps.index_copy_(0, write, window[:, 1:])
        query, key, value = self._heads_of(self._convolved([window[:, tap] for tap in range(window.shape[1])]))
        decay, strength = self._gates(beta, rate)
        state = memory.index_select(0, read).mul_(decay.exp()[..., None, None])
        fresh = (value - _looked_up(key, state)) * strength.unsqueeze(-1)
        state.addcmul_(key.unsqueeze(-1), fresh.unsqueeze(-2))
        memory.index_copy_(0, write, state)
        return self._gated(_looked_up(query, state), gate)

    def prompt(
        self, projected: Tensor, taps: Tensor, memory: Tensor, read: int | None, write: int, *, one_by_one: bool
    ) -> Tensor:
        """Return [n, heads * value_dim] for the next n tokens of one sequence, of which `project` made `projected`.

        Args:
            taps, memory: as of `decode`.
            read: the sequence's state before the tokens; None at its start.
            write: where its state behind them goes.
            one_by_one: compute each token as `decode` does, so that it does not matter how a prompt is cut.
        """
        import torch

        mixed, gate, beta, rate = torch.split(projected, self._sizes, -1)
        before = mixed.new_zeros(taps.shape[1:]) if read is None else taps[read]
        window = torch.cat((before, mixed))
        taps[write] = window[len(mixed) :]
        query, key, value = self._heads_of(
            self._convolved([window[tap : tap + len(mixed)] for tap in range(len(self._taps))])
        )
        decay, strength = self._gates(beta, rate)
        state = torch.zeros_like(memory[0]) if read is None else memory[read].clone()
        rule = _each if one_by_one else _in_chunks
        query, key, value, decay, strength = (x.transpose(0, 1) for x in (query, key, value, decay, strength))
        out, state = rule(query, key, value, decay, strength, state)
        memory[write] = state
        return self._gated(out.transpose(0, 1), gate)

    def _convolved(self, windows: list[Tensor]) -> Tensor:
        """Return silu of the convolution, [n, channels], of each tap's inputs [n, channels]."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        total = windows[0].float() * self._taps[0].float()
        for inputs, weight in zip(windows[1:], self._taps[1:], strict=True):
            total.addcmul_(inputs.float(), weight.float())
        if self._bias is not None:
            total += self._bias.float()
        return F.silu(total.to(self._taps.dtype))

    def _heads_of(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query and key [n, heads, key_dim], each of length 1, and value [n, heads, value_dim], in float32."""
        import torch

        query, key, value = torch.split(mixed.float(), self._widths, -1)
        query, key = (_of_length_one(part.reshape(len(mixed), -1, self._key_dim)) for part in (query, key))
        # A key head serves as many value heads, which follow one another.
        query, key = (part.repeat_interleave(self._shared, 1) for part in (query, key))
        return query * self._key_dim**-0.5, key, value.reshape(len(mixed), -1, self._value_dim)

    def _gates(self, beta: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of how much of the memory stays, and how strongly is written, float32 [n, heads]."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return self._rate * F.softplus(rate.float() + self._shift), beta.sigmoid().float()

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """Return silu(gate) * the normalised output of each head, [n, heads * value_dim] in the weights' dtype."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        normed = self._kernels.rms_norm(out.to(self._norm.dtype).float(), None, self._eps).to(self._norm.dtype)
        gated: Tensor = (normed * self._norm) * F.silu(gate.float()).view(len(gate), -1, self._value_dim)
        return gated.to(gate.dtype).flatten(1)


def _looked_up(vector: Tensor, state: Tensor) -> Tensor:
    """Return what a state [..., key_dim, value_dim] holds under a vector [..., key_dim]: [..., value_dim]."""
    import torch

    rows = torch.bmm(vector.reshape(-1, 1, vector.shape[-1]), state.view(-1, *state.shape[-2:]))
    return rows.view(*vector.shape[:-1], state.shape[-1])


def _of_length_one(x: Tensor) -> Tensor:
    import torch

    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def _each(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output [heads, n, value_dim] and the state behind n tokens, one token after the other."""
    import torch

    outs = []
    for at in range(query.shape[1]):
        state = state * decay[:, at, None, None].exp()
        fresh = (value[:, at] - _looked_up(key[:, at], state)) * strength[:, at, None]
        state = torch.addcmul(state, key[:, at].unsqueeze(-1), fresh.unsqueeze(-2))
        outs.append(_looked_up(query[:, at], state))
    return torch.stack(outs, 1), state


def _in_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `_each` does, by matrix products over CHUNK tokens.

    Within a chunk, what a token writes depends on what those before it wrote: a triangular system, solved at once for
    all chunks. Then the state passes from chunk to chunk.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    count, size = query.shape[1], min(CHUNK, query.shape[1])
    pad = -count % size
    # Tokens that write nothing and let nothing fade. From here on [heads * chunks, size, ...].
    query, key, value = (F.pad(x, (0, 0, 0, pad)).reshape(-1, size, x.shape[-1]) for x in (query, key, value))
    decay, strength = (F.pad(x, (0, pad)).reshape(-1, size, 1) for x in (decay, strength))
    faded = decay.cumsum(1)
    later = torch.ones((size, size), dtype=torch.bool, device=query.device).triu(1)
    between = (faded - faded.transpose(1, 2)).masked_fill(later, float("-inf")).exp()
    written = key * strength
    right = torch.cat((value * strength, written * faded.exp()), -1)
    system = torch.bmm(written, key.transpose(1, 2)) * between
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    inside = torch.bmm(query, key.transpose(1, 2)) * between
    last = faded[:, -1:]
    # By chunk: [heads, chunks, ...].
    heads = len(state)
    fresh, reads = solved.view(heads, -1, size, solved.shape[-1]).split((value.shape[-1], key.shape[-1]), -1)
    inside = inside.view(heads, -1, size, size)
    query = (query * faded.exp()).view(heads, -1, size, query.shape[-1])
    key = (key * (last - faded).exp()).view(heads, -1, size, key.shape[-1])
    left = last.exp().view(heads, -1, 1, 1)
    outs = []
    for at in range(query.shape[1]):
        values = fresh[:, at] - torch.bmm(reads[:, at], state)
        outs.append(torch.bmm(query[:, at], state) + torch.bmm(inside[:, at], values))
        state = state * left[:, at] + torch.bmm(key[:, at].transpose(1, 2), values)
    return torch.cat(outs, 1)[:, :count], state
