"""Scores the tokens of a prompt: how likely the model took each after what stands before it."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

from qvl.backends.local.scheduling.token_rules import TokenScore

if TYPE_CHECKING:
    from torch import Tensor

    from qvl.backends.local.scheduling.step import ScheduledTokens


def num_scored(chunk: ScheduledTokens) -> int:
    """Return how many of a chunk's first tokens are followed by a token of the prompt that is to be scored."""
    sequence = chunk.sequence
    if sequence.scores is None:
        return 0
    return max(0, min(chunk.end, sequence.num_prompt - 1) - chunk.start)


def note_scores(scored: ListLike[ScheduledTokens], logits: Tensor) -> None:
    """Write the scores of `scored` chunks from their float32 `logits`, [tokens that are scored, vocabulary]."""
    import torch

    first = 0
    for chunk in scored:
        count, sequence = num_scored(chunk), chunk.sequence
        table = torch.log_softmax(logits[first : first + count], dim=-1)
        first += count
        assert sequence.scores is not None
        found, top = sequence.scores.found, sequence.scores.top
        tokens = torch.tensor(sequence.tokens[chunk.start + 1 : chunk.start + 1 + count], device=table.device)
        own = table.gather(1, tokens[:, None])
        ranks = (table > own).sum(-1) + 1
        values, others = table.topk(min(top, table.shape[1]), dim=-1)
        rows = zip(own[:, 0].tolist(), ranks.tolist(), others.tolist(), values.tolist(), strict=True)
        for number, (logprob, rank, ids, best) in enumerate(rows):
            # What is computed again after a preemption is known already.
            if chunk.start + number == len(found):
                found.append(TokenScore(logprob, rank, tuple(zip(ids, best, strict=True))))
