"""What was computed is used again: features of pictures, prefixes of prompts, and nothing of another tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.types import Message, TextPart
from tests.backends.local.requests import ask, run, run_together

if TYPE_CHECKING:
    from tests.backends.local.conftest import Opener


def test_features_are_kept_by_bytes_and_the_oldest_go_first(opened: Opener) -> None:
    one = 16 * 4 * 128 * 4  # tokens, layers of features, hidden size, bytes of float32
    backend = opened(vision_cache_bytes=2 * one, prefix_cache=False)
    for seed in (0, 6, 0, 12, 0):
        run(backend, ask(seed, "x", max_tokens=1))
    assert backend.stats()["vision_cache_bytes"] == 2 * one
    assert backend.stats()["pictures_encoded"] == 3, "the one that is asked for again and again stays"
    run(backend, ask(6, "x", max_tokens=1))
    assert backend.stats()["pictures_encoded"] == 4


def test_a_repeated_picture_skips_the_tower_and_the_prompt(opened: Opener) -> None:
    backend = opened(max_num_seqs=4)
    first = ask(7, "What brand is it? " * 6)
    cold, again = run(backend, first)[0], run(backend, first)[0]
    assert again.text == cold.text
    assert cold.usage.cached_tokens == 0
    assert again.usage.cached_tokens >= 32
    other = run(backend, ask(7, "Which category?"))[0]
    assert backend.stats()["pictures_encoded"] == 1
    assert other.usage.image_tokens == 16


def test_requests_that_arrive_together_compute_their_common_text_once(opened: Opener) -> None:
    shared = "The shop sells mugs, jackets and lamps. " * 12
    questions = [ask(7, f"{shared} {end}", max_tokens=6) for end in ("What brand?", "Which category?", "Why so?")]
    alone = [run(opened(prefix_cache=False), question)[0].text for question in questions]
    backend = opened(max_num_seqs=4)
    together = run(backend, *questions)
    assert [one.text for one in together] == alone
    cached = [one.usage.cached_tokens for one in together]
    assert sorted(tokens >= 128 for tokens in cached) == [False, True, True]
    assert backend.stats()["prefix_hit_tokens"] == sum(cached)


def test_questions_about_one_picture_that_arrive_together_do_not_wait_for_each_other(opened: Opener) -> None:
    backend = opened(max_num_seqs=16)
    told = run_together(backend, *(ask(7, f"Is it {number}?", max_tokens=1) for number in range(12)))
    assert backend.stats()["pictures_encoded"] == 1
    assert backend.stats()["steps"] <= 2
    assert sum(one.usage.cached_tokens >= 16 for one in told) == 11


def test_what_another_salt_computed_is_not_reused(opened: Opener) -> None:
    backend = opened(max_num_seqs=4)
    first = ask(7, "What brand is it? " * 6)
    told = [run(backend, first.replace(cache_salt=salt))[0] for salt in ("a", "b", "", "b")]
    assert [one.usage.cached_tokens > 0 for one in told] == [False, False, False, True]
    assert len({one.text for one in told}) == 1
    assert backend.stats()["pictures_encoded"] == 3, "nor are the features of its pictures"


def test_multi_turn_conversations_reuse_what_was_computed(opened: Opener) -> None:
    backend = opened()
    first = ask(1, "Describe the picture. " * 4, max_tokens=40, ignore_eos=True)
    told = run(backend, first)[0]
    turns = (*first.messages, Message("assistant", (TextPart(told.text),)), *ask("Which category?").messages)
    second = run(backend, first.replace(messages=turns))[0]
    assert second.usage.cached_tokens >= 32
