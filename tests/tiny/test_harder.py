"""Harder pictures: the same for a seed, harder with the difficulty, and labelled with what is behind the noise."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qvl.tiny.harder import make_harder, unknown_brand
from qvl.tiny.render import BRANDS, sample


def test_without_difficulty_a_seed_gives_the_picture_that_it_always_gave() -> None:
    product, plain = sample(21)
    again, same = sample(21, difficulty=0.0, unknown_brands=0.0)
    assert product == again
    assert np.array_equal(np.asarray(plain), np.asarray(same))


def test_a_seed_gives_the_same_harder_picture_again_and_leaves_the_plain_one_as_it_is() -> None:
    _, plain = sample(21)
    before = np.asarray(plain).copy()
    hard = np.asarray(make_harder(plain, 21, 0.9))
    assert np.array_equal(hard, np.asarray(make_harder(plain, 21, 0.9)))
    assert np.array_equal(hard, np.asarray(sample(21, difficulty=0.9)[1]))
    assert not np.array_equal(hard, np.asarray(make_harder(plain, 22, 0.9)))
    assert np.array_equal(before, np.asarray(plain))


def test_pictures_differ_more_from_the_plain_ones_the_harder_they_are() -> None:
    def distance(difficulty: float) -> float:
        pairs = [(sample(seed)[1], sample(seed, difficulty=difficulty)[1]) for seed in range(12)]
        return sum(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in pairs) / len(pairs)

    easy, middle, hard = (distance(difficulty) for difficulty in (0.2, 0.5, 1.0))
    assert 0 < easy < middle < hard


@pytest.mark.parametrize("size", [(512, 512), (180, 320), (64, 64)])
def test_a_harder_picture_keeps_its_size_and_its_labels(size: tuple[int, int]) -> None:
    product, image = sample(5, size, difficulty=1.0)
    assert image.size == size
    assert image.mode == "RGB"
    assert product == sample(5, size)[0]


def test_unknown_brands_are_as_frequent_as_asked_and_far_from_the_known() -> None:
    dice = random.Random(0)
    for _ in range(200):
        word = unknown_brand(dice, BRANDS)
        apart = [sum(a != b for a, b in zip(word.ljust(6), brand.ljust(6), strict=True)) for brand in BRANDS]
        assert min(apart) >= 3
    products = [sample(seed, (64, 64), unknown_brands=0.3)[0] for seed in range(400)]
    branded = [product.brand for product in products if product is not None and product.brand is not None]
    assert 0.24 < sum(brand not in BRANDS for brand in branded) / len(branded) < 0.36


@pytest.mark.parametrize("difficulty", [-0.1, 1.5, float("nan")])
def test_a_difficulty_outside_its_range_is_refused(difficulty: float) -> None:
    with pytest.raises(ValueError, match="must be 0 to 1"):
        make_harder(sample(1)[1], 1, difficulty)
