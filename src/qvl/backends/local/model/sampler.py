"""Chooses the next token of every sequence of a step, each by its own SamplingParams, in tensor operations.

Order of operations (vLLM's): grammar mask, logprobs, rules about single tokens, penalties, temperature, min_p, top_k,
top_p, draw. A draw's random number is a hash of the sequence's seed and the token's position, so it depends neither on
the rest of the batch nor on a preemption. The logits may: in bfloat16 and float16 their last bits depend on the number
of rows of a matrix product, unless the backend is `batch_invariant`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import numpy as np

from qvl.backends.local.model.device import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from qvl.backends.local.scheduling.sequence import Sequence

MASK64: Final = (1 << 64) - 1
# Likeliest tokens among which a draw is decided; sorting Qwen's vocabulary takes a CPU's core 15 ms a row, these 0.6.
LIKELIEST: Final = 256
# A draw as near to a border between two tokens as this share of all is decided by the sort: the sums of probabilities
# in two orders differ by 1.4e-5 at most, of any distribution that was tried.
BORDER: Final = 1e-4
_RULES: Final = attrgetter("rules")
# Dividing by less than this overflows; the answer is the greedy one anyway.
GREEDY_BELOW: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; `logprob` and `top` ((token, logprob) pairs, best first) if the request wants logprobs.

    A token below 0 says that none may come: what the request allows and its grammar exclude each other.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """Return the pseudo-random number in [0, 1) of a seed and token position (splitmix64, Steele et al. 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample(logits: Tensor, sequences: ListLike[Sequence], mask: Tensor | None = None) -> list[Sampled]:
    """Return one token for each row.

    Args:
        sequences: of each row; rows of one sequence are of positions that follow each other.
        logits: float32 [len(sequences), vocabulary]; changed in place.
        mask: bool, same shape, True where the grammar forbids a token.
    """
    if mask is not None:
        logits.masked_fill_(mask, float("-inf"))
    logprobs = _logprobs(logits, sequences)
    barred = _apply_rules(logits, sequences) if any(map(_RULES, sequences)) else ()
    _penalise(logits, sequences)
    chosen = _best(logits)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        settings = to_device(_settings([sequences[row] for row in drawn]), logits.device)
        rows = to_device(np.array(drawn), logits.device)
        chosen[rows] = _draw(logits if len(drawn) == len(sequences) else logits.index_select(0, rows), settings)
    tokens: list[int] = chosen.tolist()
    # Whether any is undecided is learnt with the tokens, so that a device is waited for once.
    if undecided := [place for place, row in enumerate(drawn) if tokens[row] < 0]:
        places = to_device(np.array(undecided), logits.device)
        again = rows.index_select(0, places)
        chosen[again] = _draw_sorted(logits.index_select(0, again), settings.index_select(1, places))
        tokens = chosen.tolist()
    if logprobs is None:
        result = [Sampled(token) for token in tokens]
    else:
        result = _with_logprobs(logprobs, chosen, tokens, sequences)
    for row in barred:
        result[row] = Sampled(-1)
    return result


def _apply_rules(logits: Tensor, sequences: ListLike[Sequence]) -> list[int]:
    """Apply, in place, the rules about single tokens; return the rows in which no token is left."""
    import torch

    barred: list[int] = []
    lowest = float("-inf")
    for row, sequence in enumerate(sequences):
        rules = sequence.rules
        if rules is None:
            continue
        own = logits[row]
        if rules.allowed is not None:
            allowed = to_device(rules.allowed, logits.device)
            kept = own.index_select(0, allowed)
            own.fill_(lowest).index_copy_(0, allowed, kept)
        if len(rules.biased):
            own.index_add_(0, to_device(rules.biased, logits.device), to_device(rules.bias, logits.device))
        output = sequence.tokens[sequence.num_prompt :] if rules.bad_words else []
        own.index_fill_(0, to_device(rules.forbidden(output), logits.device), lowest)
        if sequence.num_output < rules.min_tokens:
            ends = to_device(rules.ends, logits.device)
            kept = own.index_select(0, ends)
            own.index_fill_(0, ends, lowest)
            # A grammar at its end leaves nothing else.
            if bool(torch.isneginf(own.max())):
                own.index_copy_(0, ends, kept)
        if bool(torch.isneginf(own.max())):
            barred.append(row)
            own.zero_()
    return barred


def _best(logits: Tensor) -> Tensor:
    """Return the argmax of each row, int64 [n], ties to the first. On a CPU numpy takes a tenth of torch's time."""
    import torch

    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return torch.argmax(logits, dim=-1)


def _logprobs(logits: Tensor, sequences: ListLike[Sequence]) -> tuple[dict[int, int], Tensor] | None:
    """Return (index by row, log-softmax) of the rows whose requests want logprobs, before penalties; None if none."""
    import torch

    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.wants_logprobs]
    if not rows:
        return None
    whole = len(rows) == len(sequences)
    chosen = logits if whole else logits.index_select(0, to_device(np.array(rows), logits.device))
    return {row: index for index, row in enumerate(rows)}, torch.log_softmax(chosen, dim=-1)


def _with_logprobs(
    logprobs: tuple[dict[int, int], Tensor], chosen: Tensor, tokens: list[int], sequences: ListLike[Sequence]
) -> list[Sampled]:
    index_of, table = logprobs
    rows = to_device(np.array(list(index_of)), chosen.device)
    own = table.gather(1, chosen[rows][:, None])[:, 0].tolist()
    most = max(sequences[row].sampling.logprobs or 0 for row in index_of)
    values, tops = (tensor.tolist() for tensor in table.topk(min(most, table.shape[1]), dim=-1))
    result = []
    for row, token in enumerate(tokens):
        index = index_of.get(row)
        if index is None:
            result.append(Sampled(token))
            continue
        sampling = sequences[row].sampling
        if sampling.logprob_token_ids:
            named = to_device(np.array(sampling.logprob_token_ids), table.device)
            listed = table[index].index_select(0, named).tolist()
            ranked = sorted(zip(sampling.logprob_token_ids, listed, strict=True), key=lambda pair: -pair[1])
            result.append(Sampled(token, own[index], tuple(ranked)))
            continue
        count = sampling.logprobs or 0
        pairs = zip(tops[index][:count], values[index][:count], strict=True)
        # A grammar may leave fewer choices than were asked for.
        top = tuple((other, value) for other, value in pairs if value != float("-inf"))
        result.append(Sampled(token, own[index], top))
    return result


def _penalise(logits: Tensor, sequences: ListLike[Sequence]) -> None:
    """Apply, in place, repetition_penalty over prompt and answer (Keskar et al. 2019), the others over the answer."""
    import torch

    places, factors, amounts = [], [], []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.repetition_penalty == 1.0 and not sampling.presence_penalty and not sampling.frequency_penalty:
            continue
        tokens, counts = sequence.count_tokens().arrays()
        places.append(row * logits.shape[1] + tokens)
        factors.append(np.full(len(tokens), sampling.repetition_penalty))
        amounts.append((counts > 0) * (sampling.presence_penalty + sampling.frequency_penalty * counts))
    if not places:
        return
    where = to_device(np.concatenate(places), logits.device)
    both = to_device(np.array([np.concatenate(factors), np.concatenate(amounts)], dtype=np.float32), logits.device)
    flat = logits.view(-1)
    values = flat.index_select(0, where)
    flat.index_copy_(0, where, torch.where(values > 0, values / both[0], values * both[0]) - both[1])


def _settings(sequences: ListLike[Sequence]) -> NDArray[np.float32]:
    """Return [5, n]: temperature, min_p, top_k (0: none), top_p and the next random number of each."""
    rows = []
    ahead: Counter[int] = Counter()
    for sequence in sequences:
        chosen = sequence.sampling
        number = uniform(sequence.seed, sequence.num_output + ahead[id(sequence)])
        ahead[id(sequence)] += 1
        rows.append((chosen.temperature, chosen.min_p, chosen.top_k, chosen.top_p, number))
    return np.ascontiguousarray(np.array(rows, dtype=np.float32).T)


def _draw(logits: Tensor, settings: Tensor) -> Tensor:
    """Return int64 [n], what `_draw_sorted` returns, decided among the likeliest tokens; -1 where that is not certain.

    Certain it is when every token that may come is among them (or, without filters, when the number falls on one), and
    nothing is so near to a border that a sum in another order might decide otherwise.
    """
    import torch

    if logits.shape[-1] <= 2 * LIKELIEST:
        return _draw_sorted(logits, settings)
    temperature, min_p, top_k, top_p, numbers = settings.unsqueeze(-1)
    scaled = logits / temperature
    # Of equal ones the first comes first, as in a stable sort; which of those equal to the last are there is open.
    order = scaled.topk(LIKELIEST, dim=-1).indices.sort(dim=-1).values
    ordered, within = scaled.gather(1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, within)
    probabilities = scaled.softmax(dim=-1).gather(1, order)
    least = min_p * probabilities[:, :1]
    near = ((probabilities - least).abs() <= BORDER * least).logical_and(min_p > 0).any(-1)
    keep = (probabilities >= least).logical_and(torch.arange(LIKELIEST, device=logits.device) < _limits(top_k))
    filtered = (top_k > 0).logical_or(min_p > 0)
    beyond = keep[:, -1].logical_and(filtered[:, 0])
    kept = probabilities * keep
    probabilities = torch.where(filtered, kept / kept.sum(-1, keepdim=True), probabilities)
    before = probabilities.cumsum(-1) - probabilities
    near |= ((before - top_p).abs() <= BORDER).logical_and(keep).logical_and(top_p < 1).any(-1)
    keep &= (before < top_p).logical_or(top_p >= 1)
    keep[:, 0] = True
    cumulated = (probabilities * keep).cumsum(-1)
    unfiltered = filtered.logical_or(top_p < 1).logical_not()
    beyond |= keep[:, -1].logical_and(unfiltered.logical_not()[:, 0])
    target = numbers * torch.where(unfiltered, 1.0, cumulated[:, -1:])
    near |= ((cumulated - target).abs() <= BORDER * cumulated[:, -1:]).any(-1)
    place = torch.searchsorted(cumulated, target, right=True).clamp(max=LIKELIEST - 1)
    certain = ordered.gather(1, place) > ordered[:, -1:]
    return torch.where(certain[:, 0] & ~near & ~beyond, order.gather(1, place)[:, 0], -1)


def _draw_sorted(logits: Tensor, settings: Tensor) -> Tensor:
    """Return int64 [n], a token of each row by temperature, min_p, top_k, top_p and the sequence's next number."""
    import torch

    temperature, min_p, top_k, top_p, numbers = settings.unsqueeze(-1)
    ordered, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    keep = probabilities >= min_p * probabilities[:, :1]
    keep &= torch.arange(logits.shape[-1], device=logits.device) < _limits(top_k)
    kept = probabilities * keep
    # Each row as if it were alone: what a filter takes away is shared out where there is one.
    filtered = (top_k > 0).logical_or(min_p > 0)
    probabilities = torch.where(filtered, kept / kept.sum(-1, keepdim=True), probabilities)
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p).logical_or(top_p >= 1)
    keep[:, 0] = True
    cumulated = (probabilities * keep).cumsum(-1)
    chosen = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
    # Rounding may put the number at the very end: the last kept token then.
    last = (cumulated < cumulated[:, -1:]).sum(-1, keepdim=True)
    tokens: Tensor = order.gather(1, torch.minimum(chosen, last))[:, 0]
    return tokens


def _limits(top_k: Tensor) -> Tensor:
    """Return how many of the likeliest tokens each row may keep by its top_k."""
    return top_k.masked_fill(top_k == 0, float("inf"))
