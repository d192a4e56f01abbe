"""The sampler, held against plain definitions and transformers' own processors, row by row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qvl.backends.local.model.sampler import Sampled, sample, uniform
from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.text.processor import PreparedRequest
from qvl.types import SamplingParams

WORDS = 40
PROMPT = [3, 7, 7, 11]


def sequence(*answer: int, seed: int = 0, **sampling: Any) -> Sequence:
    prepared = PreparedRequest(PROMPT, np.zeros((3, len(PROMPT)), dtype=np.int64), 0, ())
    made = Sequence(None, 0, prepared, SamplingParams(max_tokens=50, **sampling), 0, seed)
    for token in answer:
        made.append(token)
    return made


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, WORDS), generator=torch.Generator().manual_seed(seed)) * 3


def drawn(count: int, **sampling: Any) -> Counter[int]:
    """How often each token came, of `count` sequences that differ in their seed alone."""
    rows = logits().expand(count, WORDS).clone()
    return Counter(found.token for found in sample(rows, [sequence(seed=n, **sampling) for n in range(count)]))


def expected(*warpers: Any) -> torch.Tensor:
    scores = logits()
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({"temperature": 1.0}, ()),
        ({"temperature": 2.5}, (TemperatureLogitsWarper(2.5),)),
        ({"temperature": 1.0, "top_k": 5}, (TopKLogitsWarper(5),)),
        ({"temperature": 1.5, "top_p": 0.8}, (TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8))),
        ({"temperature": 1.0, "min_p": 0.05}, (MinPLogitsWarper(0.05),)),
        ({"temperature": 1.0, "top_k": 12, "top_p": 0.7}, (TopKLogitsWarper(12), TopPLogitsWarper(0.7))),
    ],
)
def test_tokens_come_as_often_as_transformers_would_have_them(sampling: dict[str, Any], warpers: tuple[Any]) -> None:
    count = 6000
    found, wanted = drawn(count, **sampling), expected(*warpers)
    assert set(found) <= set(wanted.nonzero()[:, 0].tolist()), "a token that is filtered out never comes"
    for token in range(WORDS):
        share = float(wanted[token])
        assert abs(found[token] / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-3


def test_every_row_has_parameters_of_its_own() -> None:
    mixed = [
        sequence(),
        sequence(seed=4, temperature=1.3, top_k=6),
        sequence(seed=4, temperature=0.7, top_p=0.5),
        sequence(9, 9, presence_penalty=1.5, frequency_penalty=0.5),
        sequence(repetition_penalty=1.6, logprobs=2),
    ]
    rows = logits(len(mixed), seed=3)
    together = [found.token for found in sample(rows.clone(), mixed)]
    alone = [sample(rows[n : n + 1].clone(), [one])[0].token for n, one in enumerate(mixed)]
    assert together == alone


def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_answer() -> None:
    one = sequence(20, 21, repetition_penalty=1.8)
    scores = logits(seed=5)
    wanted = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([one.tokens]), scores.clone())
    sample(scores, [one])
    torch.testing.assert_close(scores, wanted)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    scores = logits(seed=6)
    before = scores.clone()
    sample(scores, [sequence(20, 20, 21, presence_penalty=0.5, frequency_penalty=0.25)])
    change = before - scores
    assert change[0, 20] == pytest.approx(0.5 + 2 * 0.25)
    assert change[0, 21] == pytest.approx(0.5 + 0.25)
    assert change.count_nonzero() == 2


def test_a_masked_token_never_comes_and_takes_no_probability() -> None:
    allowed = [5, 6]
    mask = torch.ones((1, WORDS), dtype=torch.bool)
    mask[0, allowed] = False
    for seed in range(50):
        (found,) = sample(logits(), [sequence(seed=seed, temperature=3.0, logprobs=5)], mask)
        assert isinstance(found, Sampled)
        assert found.token in allowed
        assert {token for token, _ in found.top} == set(allowed)
        assert sum(np.exp(value) for _, value in found.top) == pytest.approx(1, abs=1e-5)


def test_numbers_depend_on_seed_and_place_alone_and_are_even() -> None:
    numbers = [uniform(seed, place) for seed in range(60) for place in range(60)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.02
    assert uniform(7, 3) == uniform(7, 3)
