"""Guessed tokens change the number of steps, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from qvl.backends.local.model.sampler import sample
from qvl.backends.local.scheduling.kv_cache import KvCache
from qvl.backends.local.scheduling.lookup import MOST, PAUSE, PromptLookup, can_guess
from qvl.backends.local.scheduling.prefix_cache import PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.text.processor import PreparedRequest
from qvl.types import ResponseFormat as Format
from qvl.types import Result, SamplingParams, Tool
from tests.backends.local.reference import clear
from tests.backends.local.requests import ask, freed, run, run_together
from tests.backends.local.test_equals_generate import check

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.backends.local.backend import LocalBackend
    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener
    from tests.backends.local.reference import Reference


def questions(count: int, **sampling: Any) -> list[ChatRequest]:
    made = []
    for place in range(count):
        parts = [place] if place % 3 == 0 else []
        made.append(ask(*parts, "red mug, blue shoe, " * (1 + place % 4), **{"max_tokens": 90, **sampling}))
    return made


def told(result: Result) -> list[Any]:
    return [
        (choice.text, choice.finish_reason, [token.token for token in choice.logprobs or ()])
        for choice in result.choices
    ]


def test_greedy_answers_are_those_of_transformers(
    opened: Opener, random_folder: Path, random_reference: Reference
) -> None:
    wanted, expected = clear(questions(5), random_reference.generate)
    for speculate in ("on", "auto"):
        backend = opened(random_folder, speculate=speculate, max_num_batched_tokens=64)
        check(random_reference, run(backend, *wanted), expected)
        check(random_reference, [run(backend, request)[0] for request in wanted[:2]], expected[:2])
        stats = backend.stats()
        assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
        freed(backend)


def test_seeded_answers_logprobs_stops_and_choices_are_as_without(opened: Opener, random_folder: Path) -> None:
    wanted = [
        *questions(3, temperature=0.1, seed=5, logprobs=2, ignore_eos=True, n=2),
        *questions(2, temperature=0.5, seed=4, top_k=4, top_p=0.9, min_p=0.05, max_tokens=60),
        *questions(2, logprobs=0, max_tokens=61, ignore_eos=True),
        *questions(2, presence_penalty=0.4, max_tokens=20),
        *questions(2, repetition_penalty=1.2, max_tokens=20),
        ask("Say hello.", max_tokens=40).replace(response_format=Format("regex", pattern="[a-c]{30}")),
    ]
    off, on = opened(random_folder, speculate="off"), opened(random_folder, speculate="on", max_num_seqs=4)
    expected = run(off, *wanted)
    # A stop string within what was guessed.
    middle = expected[5].text[len(expected[5].text) // 2 :][:3]
    stopped = ask("x", max_tokens=61, ignore_eos=True, stop=(middle,)).replace(messages=wanted[5].messages)
    expected += run(off, stopped)
    results = run(on, *wanted, stopped)
    assert [told(result) for result in results] == [told(result) for result in expected]
    assert [result.usage.completion_tokens for result in results] == [r.usage.completion_tokens for r in expected]
    for result, other in zip(results, expected, strict=True):
        assert [token.logprob for token in result.logprobs or ()] == pytest.approx(
            [token.logprob for token in other.logprobs or ()], abs=1e-4
        )
    assert off.stats()["drafted_tokens"] == 0 < on.stats()["accepted_tokens"]
    assert on.stats()["generated_tokens"] == off.stats()["generated_tokens"]


FORM = Format(
    "json_schema",
    schema={
        "type": "object",
        "properties": {
            "category": {"enum": ["mug", "shoe", "shirt"]},
            "price": {"type": "number", "maximum": 99},
            "name": {"type": "string", "maxLength": 8},
            "sold": {"type": "boolean"},
            "size": {"enum": ["small", "large"]},
        },
        "required": ["category", "price", "name", "sold", "size"],
    },
)


@pytest.mark.parametrize(
    "sampling", [{}, pytest.param({"temperature": 1.2, "seed": 3, "top_k": 30, "n": 2}, marks=pytest.mark.slow)]
)
def test_under_a_grammar_tokens_and_logprobs_are_as_without_guesses(
    opened: Opener, random_folder: Path, sampling: dict[str, Any]
) -> None:
    wanted = [r.replace(response_format=FORM) for r in questions(4, logprobs=2, max_tokens=120, **sampling)]
    off, on = opened(random_folder, speculate="off"), opened(random_folder, max_num_batched_tokens=48)
    expected, results = run(off, *wanted), run(on, *wanted)
    assert [told(result) for result in results] == [told(result) for result in expected]
    for result, other in zip(results, expected, strict=True):
        assert [token.logprob for token in result.logprobs or ()] == pytest.approx(
            [token.logprob for token in other.logprobs or ()], abs=1e-4
        )
    stats = on.stats()
    assert off.stats()["drafted_tokens"] == 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
    assert run(off, wanted[0])[0].text == run(on, wanted[0])[0].text
    assert on.stats()["generated_tokens"] == off.stats()["generated_tokens"]
    freed(on)


WEIGH = Tool("weigh", "Weighs a thing.", FORM.schema or {}, strict=True)


@pytest.mark.slow
def test_under_a_grammar_answers_end_as_without_guesses(opened: Opener, random_folder: Path) -> None:
    wanted = []
    for question in questions(2, logprobs=2, max_tokens=120):
        ways: list[dict[str, Any]] = [{"stop": (stop,)} for stop in ('", "price"', '"category', 'ice": ', ' "', '"')]
        ways += [{"max_tokens": tokens} for tokens in range(1, 30, 3)]
        ways += [{"presence_penalty": 0.5, "temperature": 0.7, "seed": 3}, {"min_tokens": 3, "logit_bias": {5: 1.0}}]
        ways += [{"n": 3, "temperature": 1.0, "seed": 9}, {"bad_words": ("mug",)}]
        wanted += [question.replace(response_format=FORM, sampling=replace(question.sampling, **way)) for way in ways]
        for choice in ("required", "auto", "weigh"):
            wanted.append(question.replace(tools=(WEIGH,), tool_choice=choice))
    # So few tokens that runs of forced ones fill steps.
    off, on = opened(random_folder, speculate="off"), opened(random_folder, speculate="on", max_num_batched_tokens=48)
    expected, results = run(off, *wanted), run(on, *wanted)
    assert [told(result) for result in results] == [told(result) for result in expected]
    assert on.stats()["accepted_tokens"] > 0
    freed(on)


@pytest.mark.parametrize(
    ("schema", "before", "expected"),
    [
        ({"enum": ["mug", "shoe"]}, '{"a":', ' "'),
        ({"type": "string"}, '{"a":', ' "'),
        ({"type": "number"}, '{"a":', " "),
        ({"type": "boolean"}, '{"a":', ""),
        ({"type": ["string", "null"]}, '{"a":', ""),
        ({"type": "string"}, '{"a": "mu', ""),
    ],
)
def test_what_must_come_is_expected_as_the_tokenizer_mostly_spells_it(
    tiny: LocalBackend, schema: dict[str, Any], before: str, expected: str
) -> None:
    assert tiny._loaded is not None
    grammars, tokenizer = tiny._loaded.maker.grammars, tiny._loaded.checkpoint.tokenizer
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    matcher = grammars.matcher(ask("x").replace(response_format=Format("json_schema", schema=whole)))
    assert matcher is not None
    assert all(matcher.consume_token(token) for token in tokenizer.encode(before))
    assert tokenizer.decode(grammars.probable(matcher)) == expected


def test_in_the_batch_invariant_mode_not_even_the_last_bit_changes(opened: Opener, random_folder: Path) -> None:
    wanted = questions(3, logprobs=0, ignore_eos=True, max_tokens=60)
    bits = []
    for speculate in ("off", "on"):
        backend = opened(random_folder, dtype="bfloat16", batch_invariant=True, speculate=speculate)
        bits.append([[(t.token, t.logprob) for t in result.logprobs or ()] for result in run(backend, *wanted)])
    assert bits[0] == bits[1]
    assert backend.stats()["accepted_tokens"] > 0


def test_sequences_that_give_way_lose_nothing(opened: Opener, random_folder: Path, random_reference: Reference) -> None:
    backend = opened(
        random_folder, kv_cache_bytes=780 * 768, max_model_len=512, prefix_cache=False, speculate="on", max_num_seqs=6
    )
    asked = [ask(place, "Say hello. " * 10, max_tokens=160) for place in range(5)]
    wanted, expected = clear(asked, random_reference.generate)
    check(random_reference, run_together(backend, *wanted), expected)
    assert backend.stats()["num_preemptions"] > 0
    assert backend.stats()["accepted_tokens"] > 0


def test_a_guess_is_what_followed_the_last_three_tokens_where_they_stood_last() -> None:
    lookup = PromptLookup()
    text = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2]
    assert lookup.guess(text, 9) == ()
    text.append(3)
    assert lookup.guess(text, 9) == (6, 7, 1)
    assert lookup.guess(text, 2) == (6, 7)
    assert lookup.guess([*text, 9], 0) == ()
    lookup.learn(3, 3)
    lookup.learn(6, 6)
    assert len(lookup.guess([*text, 6, *range(10, 40), 2, 3, 6], 99)) == min(12, MOST)


def test_who_guesses_wrongly_rests_and_longer_each_time() -> None:
    lookup, text, rests = PromptLookup(), [1, 2, 3] * 3, []
    for _ in range(4):
        lookup.learn(3, 0)
        rest = 0
        while not lookup.guess(text, 3):
            rest += 1
        rests.append(rest)
    assert rests == [PAUSE, 2 * PAUSE, 4 * PAUSE, 8 * PAUSE]
    lookup.learn(3, 1)
    assert lookup.guess(text, 3)


def test_guesses_fill_up_small_steps_alone_and_never_grow_a_row() -> None:
    kv = KvCache(4096, 256, smallest=32)
    scheduler = Scheduler(kv, PrefixIndex(kv, 0), 16, 64, draft_rows=8)

    def sequence(place: int, max_tokens: int = 60) -> Sequence:
        tokens = [1, 2, 3, 4] * 4
        prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, ())
        made = Sequence(None, 0, prepared, SamplingParams(max_tokens=max_tokens), place, 0)
        scheduler.add(made)
        return made

    def decode(members: list[Sequence]) -> Any:
        for member in members:
            member.num_computed = len(member.tokens)
            member.append(member.tokens[-4])
        return scheduler.schedule()

    first = sequence(0)
    scheduler.schedule()
    step = decode([first])
    assert [(chunk.start, chunk.count, chunk.draft) for chunk in step.prefill] == [(16, 1, (2, 3, 4))]
    assert not step.decode
    assert step.num_tokens == 4
    others = [sequence(place) for place in (1, 2, 3, 4)]
    scheduler.schedule()
    step = decode([first, *others])
    assert step.num_tokens == 8
    assert [len(chunk.draft) for chunk in step.prefill] == [3]
    others += [sequence(place) for place in (5, 6, 7)]
    scheduler.schedule()
    step = decode([first, *others])
    assert (len(step.decode), step.prefill) == (8, [])
    for other in others:
        scheduler.finish(other)
    # Nor beyond what may still be written, nor beyond the row.
    last = sequence(9, max_tokens=3)
    scheduler.finish(first)
    scheduler.schedule()
    assert [len(chunk.draft) for chunk in decode([last]).prefill] == [1]
    assert last.slot is not None
    last.sampling = SamplingParams(max_tokens=200)
    while len(last.tokens) < last.slot.capacity:
        step = decode([last])
        assert all(chunk.end + len(chunk.draft) <= last.slot.capacity for chunk in step.prefill)


def test_guesses_of_a_grammar_leave_half_of_a_step_to_prompts() -> None:
    kv = KvCache(8192, 512, smallest=32)
    scheduler = Scheduler(kv, PrefixIndex(kv, 0), 8, 32, draft_rows=8)

    def sequence(place: int, length: int) -> Sequence:
        tokens = list(range(100 * place, 100 * place + length))
        prepared = PreparedRequest(tokens, np.zeros((3, length), dtype=np.int64), 0, ())
        made = Sequence(None, 0, prepared, SamplingParams(max_tokens=60), place, 0)
        scheduler.add(made)
        return made

    answers = [sequence(place, 8) for place in range(4)]
    scheduler.schedule()
    for answer in answers:
        answer.num_computed = len(answer.tokens)
        answer.append(9999)
        answer.lookup, answer.expected = None, tuple(range(7))
    prompt = sequence(9, 90)
    step = scheduler.schedule()
    chunks = {chunk.sequence: (chunk.count, len(chunk.draft)) for chunk in step.prefill}
    assert [chunks.pop(answer, None) for answer in answers] == [(1, 7), (1, 5), None, None]
    assert chunks == {prompt: (16, 0)}
    assert step.num_tokens == 32
    # What must come is no guess: it may take all, and then the prompt waits.
    prompt.num_computed = 16
    for answer in answers:
        answer.num_computed = len(answer.tokens)
        for token in range(8):
            answer.append(token)
    step = scheduler.schedule()
    assert [(chunk.sequence, chunk.count) for chunk in step.prefill] == [(answer, 8) for answer in answers]


def test_rows_of_one_sequence_draw_the_numbers_of_positions_that_follow_each_other() -> None:
    def sequence(answer: int) -> Sequence:
        prepared = PreparedRequest([1, 2], np.zeros((3, 2), dtype=np.int64), 0, ())
        made = Sequence(None, 0, prepared, SamplingParams(max_tokens=50, temperature=1.0), 0, 5)
        for token in range(answer):
            made.append(token)
        return made

    logits = torch.randn((6, 40), generator=torch.Generator().manual_seed(0)) * 2
    one, other = sequence(2), sequence(7)
    together = [sampled.token for sampled in sample(logits.clone(), [one, other, other, one, one, one])]
    places = [2, 7, 8, 3, 4, 5]
    alone = [sample(logits[row : row + 1].clone(), [sequence(place)])[0].token for row, place in enumerate(places)]
    assert together == alone


def test_penalties_are_not_guessed_for() -> None:
    assert can_guess(SamplingParams(temperature=1.0, top_k=3, seed=1))
    for penalty in ({"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}):
        assert not can_guess(SamplingParams(**penalty))
