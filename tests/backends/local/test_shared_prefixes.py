"""Prompts that begin alike read one row of KV together, and their answers stay those of transformers."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model import attention_kernels
from qvl.backends.local.model.shared_rows import add_shared, attention_with_sums, can_share
from qvl.types import ResponseFormat, Result
from tests.backends.local.reference import clear
from tests.backends.local.requests import ask, freed, run, same_but_for_ties
from tests.backends.local.test_equals_generate import Answered, answer_all, check
from tests.backends.local.test_faults import FaultyBackend

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener
    from tests.backends.local.reference import Reference

SHOP = "The shop sells mugs, jackets and lamps, and takes back what is not worn. " * 14
OTHER = "Prices are in euros, and nothing is sold to whom the shop does not know. " * 9


def alike(count: int, longest: int = 24) -> list[ChatRequest]:
    """Two systems, of which one has pictures in front of the question; questions and answers of all lengths."""
    dice = random.Random(3)
    made = []
    for place in range(count):
        system, pictures = (SHOP, []) if place % 3 else (OTHER, [4, 0])
        words = " ".join(dice.choice(("mug", "lamp", "why", "red")) for _ in range(dice.randrange(1, 30)))
        made.append(ask(*pictures, words, system=system, max_tokens=dice.randrange(1, longest)))
    return made


@pytest.fixture(scope="module")
def answered(random_reference: Reference) -> Answered:
    return clear(alike(30), random_reference.generate)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 24, "max_num_batched_tokens": 160, "speculate": "on"},
        {"max_num_seqs": 30, "max_num_batched_tokens": 4096, "speculate": "off"},
        # Kept rows are given away while others read them, and sequences give way and come back.
        {"kv_cache_bytes": 2600 * 768, "max_model_len": 768, "max_num_seqs": 8},
    ],
    ids=["small steps", "one step", "small memory"],
)
@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(
    opened: Opener, random_folder: Path, random_reference: Reference, answered: Answered, settings: dict[str, Any]
) -> None:
    wanted, expected = answered
    backend = opened(random_folder, **settings)
    check(random_reference, answer_all(backend, wanted), expected)
    check(random_reference, run(backend, *wanted), expected)
    stats = backend.stats()
    assert stats["prefix_hit_tokens"] > 20 * 256
    if "kv_cache_bytes" in settings:
        assert stats["prefix_evictions"] > 0
    freed(backend)


def test_a_prefix_is_held_and_computed_once_among_those_that_start_together(
    opened: Opener, random_folder: Path
) -> None:
    wanted = [ask(0, f"{SHOP} Is it {number}?", max_tokens=20) for number in range(12)]
    alone, together = opened(random_folder, max_num_seqs=12), opened(random_folder, max_num_seqs=12)
    texts = [run(alone, request)[0].text for request in wanted]
    found = run(together, *wanted)
    assert [result.text for result in found] == texts
    prompt = found[0].usage.prompt_tokens
    assert prompt > 512
    cached = sorted(result.usage.cached_tokens for result in found)
    assert cached[0] == 0
    assert cached[1] > prompt - 20, "all of what is common, to the token"
    assert together.stats()["pictures_encoded"] == 1
    # Twelve copies would be 12 rows of 1,024 tokens: one is there, and each has a row of 256 for its own.
    kept = together.stats()
    assert kept["prefix_tokens"] <= 1024 + 12 * 256


def test_those_that_are_aborted_take_nothing_from_the_others(
    opened: Opener, random_folder: Path, random_reference: Reference, answered: Answered
) -> None:
    wanted, expected = answered
    backend = opened(random_folder, max_num_seqs=16, max_num_batched_tokens=200)
    dice = random.Random(5)

    async def all_of_them() -> list[Result | BaseException]:
        tasks = [asyncio.create_task(backend.generate(request)) for request in wanted]
        for task in dice.sample(tasks, 10):
            await asyncio.sleep(dice.random() / 8)
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(all_of_them())
    whole = [(answer, ids) for answer, ids in zip(answers, expected, strict=True) if isinstance(answer, Result)]
    assert len(whole) >= len(wanted) - 10
    check(random_reference, [answer for answer, _ in whole], [ids for _, ids in whole])
    freed(backend)


def test_streams_choices_forms_and_seeds_are_the_same_alone_and_together(opened: Opener, random_folder: Path) -> None:
    form = ResponseFormat(
        "json_schema",
        schema={
            "type": "object",
            "properties": {"kind": {"enum": ["mug", "lamp"]}, "words": {"type": "string", "maxLength": 20}},
            "required": ["kind", "words"],
            "additionalProperties": False,
        },
    )
    asked = [
        ask("what?", system=SHOP, max_tokens=30, n=4, seed=1, temperature=0.8),
        *(ask(f"{n}?", system=SHOP, max_tokens=90).replace(response_format=form) for n in range(4)),
        *(ask(f"{n}?", system=SHOP, max_tokens=20, seed=n, temperature=1.0, logprobs=2) for n in range(4)),
        *(ask(f"{n}?", system=SHOP, max_tokens=40, repetition_penalty=1.2) for n in range(3)),
    ]
    calm = opened(random_folder, max_num_seqs=4, prefix_cache=False)
    expected = [run(calm, request)[0] for request in asked]
    backend = opened(random_folder, max_num_seqs=20, max_num_batched_tokens=300)

    async def streamed(request: ChatRequest) -> list[str]:
        texts = [""] * request.sampling.n
        async for chunk in backend.stream(request):
            texts[chunk.index] += chunk.text
        return texts

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(streamed(request) for request in asked))

    for _ in range(2):
        assert asyncio.run(all_of_them()) == [[choice.text for choice in result.choices] for result in expected]
    assert backend.stats()["forced_tokens"] > 0
    freed(backend)


def test_weights_in_8_bits_and_bfloat16_answer_from_shared_rows_too(opened: Opener) -> None:
    """Their last bits depend on how attention is summed up: answers part only where two tokens are nearly as likely."""
    questions = [ask(number, SHOP + " What brand is it?", max_tokens=12, logprobs=2) for number in (0, 0, 6, 6, 0)]
    for settings in ({"quantize": "int8"}, {"dtype": "bfloat16"}):
        backend = opened(max_num_seqs=8, **settings)
        told = run(backend, *questions)
        assert sum(result.usage.cached_tokens > 256 for result in told) >= 3
        assert all(result.usage.completion_tokens for result in told)
        for one, other in ((0, 1), (0, 4), (2, 3)):
            same_but_for_ties(told[one], told[other])
        freed(backend)


def test_what_joined_a_step_that_ran_out_of_memory_starts_again(opened: Opener, random_folder: Path) -> None:
    wanted = [ask(f"{SHOP} {number}?", max_tokens=6) for number in range(6)]
    texts = [result.text for result in run(opened(random_folder, prefix_cache=False), *wanted)]
    backend = opened(random_folder, kind=FaultyBackend, max_num_seqs=8, max_num_batched_tokens=2048)
    assert isinstance(backend, FaultyBackend)
    forward, failed = backend.runner.forward, []
    backend.runner.hold = threading.Event()

    def once(step: Any) -> Any:
        if step.joined and not failed:
            failed.append(len(step.joined))
            raise torch.OutOfMemoryError("out of memory")
        return forward(step)

    async def all_of_them() -> list[Result]:
        """All arrive while the step of another runs, and so start in one step."""
        assert backend.runner.hold is not None
        first = asyncio.create_task(backend.generate(ask("x", max_tokens=1)))
        while not backend.stats()["num_running"]:
            await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(backend.generate(request)) for request in wanted]
        while len(backend._loaded.engine.mailbox) <= len(wanted):  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        backend.runner.hold.set()
        await first
        return list(await asyncio.gather(*tasks))

    backend.runner.forward = once  # type: ignore[method-assign]
    assert [result.text for result in asyncio.run(all_of_them())] == texts
    assert failed == [5]
    assert backend.stats()["memory_errors"] == 1
    freed(backend)


def test_a_turn_goes_on_in_the_row_of_the_turn_before(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    first = ask(1, OTHER, max_tokens=40, ignore_eos=True)
    told = run(backend, first)[0]
    rows = backend.stats()["prefix_tokens"]
    messages = (*first.messages, *ask(told.text).messages, *ask("Which category?").messages)
    second = run(backend, first.replace(messages=messages))[0]
    assert second.usage.cached_tokens > 256
    assert backend.stats()["prefix_tokens"] <= rows + 256


def test_where_each_token_is_computed_as_if_alone_prefixes_are_copied(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder, batch_invariant=True)
    wanted = [ask(f"{SHOP} {number}?", max_tokens=6, logprobs=1) for number in range(4)]
    alone = [run(backend, request)[0] for request in wanted]
    assert alone[1].usage.cached_tokens > 256
    assert [result.logprobs for result in run(backend, *wanted)] == [result.logprobs for result in alone]
    freed(backend)


@pytest.mark.parametrize(("dtype", "widens"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_attention_to_parts_is_attention_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, widens: bool
) -> None:
    monkeypatch.setattr(attention_kernels, "MANY", 1)
    assert can_share(torch.device("cpu"), dtype)
    dice = torch.Generator().manual_seed(2)
    query = torch.randn((7, 6, 16), generator=dice).to(dtype)
    key, value = (torch.randn((2, 50, 16), generator=dice).to(dtype) for _ in range(2))
    whole = F.scaled_dot_product_attention(query.transpose(0, 1)[None], key[None], value[None], enable_gqa=True)
    parts = query.transpose(0, 1)[None], key[None, :, 40:], value[None, :, 40:]
    own, sums = attention_with_sums(*parts, widens=widens)
    assert own.dtype is dtype
    out, sums = own[0].transpose(0, 1).reshape(7, -1), sums[0].t().contiguous()
    add_shared(out, sums, query, key[:, :25], value[:, :25], slice(0, 7), widens=widens)
    for where in (torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5, 6])):
        add_shared(out, sums, query, key[:, 25:40], value[:, 25:40], where, widens=widens)
    close = {"atol": 2e-6, "rtol": 2e-6} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out, whole[0].transpose(0, 1).reshape(7, -1), **close)
    scores = (query.float().transpose(0, 1) @ key.float().repeat_interleave(3, 0).transpose(1, 2)) / 4
    torch.testing.assert_close(sums, scores.logsumexp(-1).t(), atol=2e-2, rtol=2e-2)
    assert not can_share(torch.device("meta"), dtype)


def test_a_backend_says_how_much_prefixes_take(tiny: LocalBackend) -> None:
    names = {"prefixes", "prefix_tokens", "prefix_hit_tokens", "prefix_evictions"}
    assert names <= tiny.stats().keys()
