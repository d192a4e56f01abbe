"""Chooses the next token of every sequence of a step, each by its own SamplingParams, in tensor operations.

Order of operations (vLLM's): grammar mask, logprobs are read here; penalties, temperature, min_p, top_k, top_p, draw.
A draw takes one number from a hash of the sequence's seed and the token's place, so it depends on nothing else in the
batch, nor on a preemption. The logits that it draws from may: in bfloat16 and float16 their last bits depend on how
many rows a product has, unless the backend is `batch_invariant`.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl.backends.local.scheduling.sequence import Sequence

MASK64: Final = (1 << 64) - 1
# Dividing by less than this overflows; the answer is the greedy one anyway.
GREEDY_BELOW: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token. `logprob` and `top` (token, logprob; best first) only where they were asked for."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) for place `position` of a sequence (splitmix64, Steele et al. 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample(logits: Tensor, sequences: ListLike[Sequence], mask: Tensor | None = None) -> list[Sampled]:
    """Return one token for each row.

    Args:
        logits: float32 [len(sequences), vocabulary]; changed in place.
        mask: bool, same shape, True where the grammar forbids a token.
    """
    import torch

    if mask is not None:
        logits.masked_fill_(mask, float("-inf"))
    logprobs = _logprobs(logits, sequences)
    _penalise(logits, sequences)
    chosen = _best(logits)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits.index_select(0, rows), [sequences[row] for row in drawn])
    tokens = chosen.tolist()
    if logprobs is None:
        return [Sampled(token) for token in tokens]
    return _with_logprobs(logprobs, chosen, tokens, sequences)


def _best(logits: Tensor) -> Tensor:
    """Return int64 [n], the first of the largest of each row. On a CPU numpy's search takes a tenth of torch's time."""
    import torch

    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return torch.argmax(logits, dim=-1)


def _logprobs(logits: Tensor, sequences: ListLike[Sequence]) -> tuple[dict[int, int], Tensor] | None:
    """Return log-softmax of the rows that want it, before penalties change them in place, and their places in it."""
    import torch

    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    if not rows:
        return None
    chosen = logits if len(rows) == len(sequences) else logits.index_select(0, torch.tensor(rows, device=logits.device))
    return {row: index for index, row in enumerate(rows)}, torch.log_softmax(chosen, dim=-1)


def _with_logprobs(
    logprobs: tuple[dict[int, int], Tensor], chosen: Tensor, tokens: list[int], sequences: ListLike[Sequence]
) -> list[Sampled]:
    import torch

    index_of, table = logprobs
    rows = torch.tensor(list(index_of), device=chosen.device)
    own = table.gather(1, chosen[rows][:, None])[:, 0].tolist()
    most = max(sequences[row].sampling.logprobs or 0 for row in index_of)
    values, tops = (tensor.tolist() for tensor in table.topk(min(most, table.shape[1]), dim=-1))
    result = []
    for row, token in enumerate(tokens):
        index = index_of.get(row)
        if index is None:
            result.append(Sampled(token))
            continue
        count = sequences[row].sampling.logprobs or 0
        pairs = zip(tops[index][:count], values[index][:count], strict=True)
        # A grammar may leave fewer choices than were asked for.
        top = tuple((other, value) for other, value in pairs if value != float("-inf"))
        result.append(Sampled(token, own[index], top))
    return result


def _penalise(logits: Tensor, sequences: ListLike[Sequence]) -> None:
    """Apply repetition_penalty over prompt and answer (Keskar et al. 2019); presence and frequency over the answer."""
    import torch

    repeated: tuple[list[int], list[int], list[float]] = ([], [], [])
    counted: tuple[list[int], list[int], list[float]] = ([], [], [])
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1.0:
            distinct = set(sequence.tokens)
            repeated[0].extend([row] * len(distinct))
            repeated[1].extend(distinct)
            repeated[2].extend([sampling.repetition_penalty] * len(distinct))
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in sequence.counts.items():
                counted[0].append(row)
                counted[1].append(token)
                counted[2].append(sampling.presence_penalty + sampling.frequency_penalty * count)
    if repeated[0]:
        rows, tokens, penalties = _tensors(repeated, logits.device)
        values = logits[rows, tokens]
        logits[rows, tokens] = torch.where(values > 0, values / penalties, values * penalties)
    if counted[0]:
        rows, tokens, penalties = _tensors(counted, logits.device)
        logits[rows, tokens] -= penalties


def _tensors(lists: tuple[list[int], list[int], list[float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    rows, tokens, values = lists
    return (
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


def _draw(logits: Tensor, sequences: ListLike[Sequence]) -> Tensor:
    """Return int64 [n], a token of each row by temperature, min_p, top_k, top_p and the sequence's next number."""
    import torch

    device = logits.device
    params = [sequence.sampling for sequence in sequences]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled = logits / column([sampling.temperature for sampling in params])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    keep = probabilities >= column([sampling.min_p for sampling in params]) * probabilities[:, :1]
    if any(sampling.top_k for sampling in params):
        size = logits.shape[-1]
        limits = column([float(sampling.top_k or size) for sampling in params])
        keep &= torch.arange(size, device=device) < limits
        probabilities = probabilities * keep
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if any(sampling.top_p < 1 for sampling in params):
        before = probabilities.cumsum(-1) - probabilities
        keep &= before < column([sampling.top_p for sampling in params])
    keep[:, 0] = True
    cumulated = (probabilities * keep).cumsum(-1)
    numbers = column([uniform(sequence.seed, sequence.num_output) for sequence in sequences])
    chosen = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
    # Rounding may put the number at the very end: the last kept token then.
    last = (cumulated < cumulated[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, torch.minimum(chosen, last))[:, 0]
