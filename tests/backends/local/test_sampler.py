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

from qvl.backends.local.model import sampler
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


LARGE = 9000
FORMS: list[tuple[dict[str, Any], list[int]]] = [
    ({"temperature": 1.0}, [4579, 6255, 8666, 4142, 7910, 7423, 3494, 5151, 8870, 2720, 2042, 846]),
    (
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        [4835, 6255, 6793, 4142, 7910, 7423, 3494, 3825, 8870, 6810, 4365, 846],
    ),
    ({"temperature": 1.0, "top_p": 0.9}, [4235, 6255, 4115, 4142, 7910, 7423, 3494, 5151, 8870, 4950, 1062, 846]),
    ({"temperature": 1.5, "min_p": 0.05}, [5585, 4236, 8666, 4142, 4225, 7423, 3494, 5151, 7048, 8086, 2042, 846]),
    ({"temperature": 1.0, "top_k": 500}, [6292, 6255, 4115, 4142, 7910, 7423, 3494, 5151, 8870, 2437, 651, 846]),
    (
        {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        [4235, 6255, 4115, 4142, 7910, 7423, 3494, 3825, 8870, 2412, 7601, 846],
    ),
]


def peaked(seed: int) -> torch.Tensor:
    """As a model's: a few likely tokens before many others; of odd seeds rounded, so that many are equal."""
    dice = torch.Generator().manual_seed(seed)
    rows = torch.randn((1, LARGE), generator=dice) * 2 + (torch.rand((1, LARGE), generator=dice) > 0.998) * 8
    return rows.bfloat16().float() if seed % 2 else rows


@pytest.mark.parametrize(("sampling", "tokens"), FORMS)
def test_a_seed_gives_the_tokens_that_it_always_gave(sampling: dict[str, Any], tokens: list[int]) -> None:
    rows = [sequence(seed, seed + 1, seed, seed=seed, **sampling) for seed in range(12)]
    assert [found.token for found in sample(torch.cat([peaked(seed) for seed in range(12)]), rows)] == tokens
    alone = [sample(peaked(seed), [one])[0].token for seed, one in enumerate(rows)]
    assert alone == tokens


def test_a_draw_among_the_likeliest_tokens_is_that_of_the_whole_sorted_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With so few tokens decided by themselves, every reason to sort after all comes up."""
    monkeypatch.setattr(sampler, "LIKELIEST", 24)
    dice = np.random.default_rng(0)
    certain = 0
    for seed in range(25):
        settings = torch.from_numpy(
            np.array(
                [
                    dice.uniform(0.3, 2, 40),
                    dice.choice([0, 0, 0.02, 0.2], 40),
                    dice.choice([0, 0, 5, 20, 60], 40),
                    dice.choice([1, 1, 0.5, 0.9], 40),
                    dice.random(40),
                ],
                dtype=np.float32,
            )
        )
        rows = torch.cat([peaked(40 * seed + row)[:, :700] for row in range(40)])
        rows[:10, 5:] = float("-inf")  # a grammar that allows five
        fast, exact = sampler._draw(rows, settings), sampler._draw_sorted(rows, settings)
        decided = fast >= 0
        assert torch.equal(fast[decided], exact[decided])
        certain += int(decided.sum())
    assert 0.5 < certain / 1000 < 0.99


def test_a_row_without_a_filter_is_drawn_the_same_beside_one_with_filters() -> None:
    """What min_p takes away is shared out before top_p counts, whether or not a neighbour has top_k."""
    for seed in range(60):
        one = sequence(seed=seed, temperature=1.0, min_p=0.1, top_p=0.7)
        alone = sample(logits(seed=seed), [one])[0].token
        company = [one, sequence(seed=1, temperature=1.0, top_k=3)]
        assert sample(logits(seed=seed).repeat(2, 1), company)[0].token == alone
