"""Counting the tokens of a thought, however a tokenizer cuts its marks."""

from __future__ import annotations

import itertools

import pytest

from qvl.backends.local.text.thought_tokens import ThoughtTokens


def counted(*tokens: str, opened: bool = False, free: bool = True) -> int:
    found = ThoughtTokens(opened=opened, free=free)
    for token in tokens:
        found.push(token.encode())
    return found.count


@pytest.mark.parametrize(
    ("tokens", "opened", "count"),
    [
        (["<think>", "a", "b", "</think>", "c"], False, 2),
        (["a", "b", "</think>", "c"], True, 2),
        (["\n", "<", "think", ">", "a", "<", "/th", "ink", ">", "c", "d"], False, 1),
        (["<think>", "</think>", "c"], False, 0),
        (["<think>a", "b</think>", "c"], False, 2),
        (["a", "b"], False, 0),
        (["a", "b"], True, 2),
        (["a", "</", "b", "</think", "x", "</think>"], True, 5),
        (["<think>", "a", "</think>", "b", "<think>", "c"], False, 1),
        # Half of a letter is a token all the same, and a hidden control token too.
        (["", "a", "", "</think>", "c"], True, 3),
    ],
)
def test_tokens_between_the_marks(tokens: list[str], opened: bool, count: int) -> None:
    assert counted(*tokens, opened=opened) == count


def test_an_answer_under_a_grammar_has_none() -> None:
    assert counted("<think>", "a", free=False) == 0


def test_however_the_end_is_cut() -> None:
    end = "</think>"
    for first, second in itertools.combinations(range(1, len(end)), 2):
        assert counted("ab", "cd", end[:first], end[first:second], end[second:], "ef", opened=True) == 2
