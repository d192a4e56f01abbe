"""Ways of computing attention on a CPU: the same numbers from all, and the fastest by measurement."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from qvl.backends.local.model import attention_kernels, attention_times, kernel_race, kernel_report, kernel_times
from qvl.backends.local.model.attention_kernels import DECODE_ATTENTION, MANY, PROMPT_ATTENTION
from qvl.backends.local.model.attention_times import AttentionChoice, Heads, fastest, measured_choice
from qvl.backends.local.model.kernel_times import ROWS, Times
from qvl.backends.local.model.kernels import CpuKernels, Kernels
from tests.backends.local.reference import Reference
from tests.backends.local.test_equals_generate import answer_all, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener

HEADS = Heads(16, 8, 64)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process; what this one measured comes back."""
    monkeypatch.setattr(kernel_times, "_memo", {})
    monkeypatch.setattr(kernel_times, "_passing", {})
    monkeypatch.setattr(kernel_race, "ALONE", 0.0)
    monkeypatch.setattr(kernel_race.clock, "left", kernel_race.MOST_SECONDS)


@pytest.fixture
def wins(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the measurement find one way the fastest, at all numbers of rows."""

    def make(winner: str) -> None:
        def measured(heads: Heads, dtype: torch.dtype, *rest: object) -> Times:
            *_, names, rows = rest
            assert isinstance(names, tuple)
            assert isinstance(rows, tuple)
            return {name: dict.fromkeys(rows, 1.0 if name == winner else 2.0) for name in names}

        for name in ("_measure_decode", "_measure_prompt"):
            monkeypatch.setattr(attention_times, name, measured)

    return make


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """In float64, written out."""
    scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores + (0 if mask is None else mask.double())).softmax(-1) @ value.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [Heads(8, 2, 32), Heads(4, 4, 80)], ids=str)
@pytest.mark.parametrize("name", [*DECODE_ATTENTION, *PROMPT_ATTENTION])
def test_every_way_gives_the_attention_to_the_visible_keys(name: str, heads: Heads, dtype: torch.dtype) -> None:
    way = {**DECODE_ATTENTION, **PROMPT_ATTENTION}[name]
    dice = torch.Generator().manual_seed(0)
    pool = torch.randn((2, 5, heads.key, 64, heads.dim), generator=dice).to(dtype)
    for rows, keys in ((1, 1), (1, 33), (3, 50), (5, 64)):
        key, value = pool[:, :rows, :, :keys]
        query = torch.randn((rows, heads.key, heads.query // heads.key, heads.dim), generator=dice).to(dtype)
        mask = torch.zeros((rows, 1, 1, keys), dtype=dtype)
        mask[: rows // 2, ..., keys // 2 :] = float("-inf")
        for hidden in (None, mask):
            out = way(query, key, value, hidden)
            assert out.dtype is dtype
            assert float((out.double() - exact(query, key, value, hidden)).abs().max()) < TOLERANCE[dtype]


def test_another_way_than_torchs_usual_one_must_save_a_tenth() -> None:
    times: Times = {"grouped": {1: 1.0, 8: 8.0, 32: 30.0}, "by-head": {1: 0.95, 8: 5.0, 32: 29.0}}
    chosen = dict(zip(ROWS, fastest(times, (1, 8, 32)), strict=True))
    assert chosen == {
        1: "grouped",
        **dict.fromkeys((2, 4, 8), "by-head"),
        **dict.fromkeys((16, 32, 64, 256), "grouped"),
    }
    assert set(fastest({}, (1, 8))) == {"grouped"}, "where nothing could be timed"
    # One that failed at some number of rows is not taken there.
    assert set(fastest({"grouped": {1: 9.0, 8: 9.0}, "by-head": {1: 1.0}}, (1, 8))) == {"by-head", "grouped"}


def test_long_rows_may_have_another_way_than_short_ones() -> None:
    choice = AttentionChoice({256: ("grouped",) * 8, 2048: ("by-head",) * 3 + ("grouped",) * 5}, "float32")
    assert [choice.of_rows(1, capacity) for capacity in (256, 512, 2048, 32768)] == ["grouped"] + ["by-head"] * 3
    assert [choice.of_rows(rows, 4096) for rows in (4, 5, 32, 500)] == ["by-head"] + ["grouped"] * 3
    assert choice.describe() == "attention of steps grouped or by-head, of prompts in float32"
    assert choice.detail()["2048 tokens"] == "by-head for up to 4 rows, grouped beyond"


@pytest.mark.parametrize("winner", DECODE_ATTENTION)
def test_decode_steps_take_the_way_that_was_fastest(
    monkeypatch: pytest.MonkeyPatch, wins: Callable[[str], None], winner: str
) -> None:
    wins(winner)
    called = []

    def seen(name: str) -> attention_kernels.Attention:
        way = DECODE_ATTENTION[name]

        def call(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            called.append(name)
            return way(query, key, value, mask)

        return call

    watched = {name: seen(name) for name in DECODE_ATTENTION}
    monkeypatch.setattr("qvl.backends.local.model.kernels.DECODE_ATTENTION", watched)
    kernels = CpuKernels()
    kernels.choose_attention(HEADS, torch.float32, decodes=True)
    assert winner in kernels.describe()
    kernels.decode_attention(torch.ones(3, 8, 2, 64), torch.ones(3, 8, 5, 64), torch.ones(3, 8, 5, 64), None, 512)
    # Heads of another shape were never measured.
    kernels.decode_attention(torch.ones(3, 4, 2, 64), torch.ones(3, 4, 5, 64), torch.ones(3, 4, 5, 64), None, 512)
    assert called == [winner, "grouped"]
    # A tower with as many heads does not decode.
    kernels.choose_attention(HEADS, torch.float32)
    kernels.decode_attention(torch.ones(3, 8, 2, 64), torch.ones(3, 8, 5, 64), torch.ones(3, 8, 5, 64), None, 512)
    assert called[2:] == [winner]


@pytest.mark.slow
@pytest.mark.parametrize("winner", PROMPT_ATTENTION)
def test_prompts_in_bfloat16_pass_in_float32_where_that_was_faster(
    monkeypatch: pytest.MonkeyPatch, wins: Callable[[str], None], winner: str
) -> None:
    wins(winner)
    kernels, plain = CpuKernels(), Kernels()
    kernels.choose_attention(HEADS, torch.bfloat16)
    assert kernels.widens(HEADS) == (winner == "float32")
    assert not kernels.widens(Heads(8, 8, 64))
    dtypes = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *rest: torch.Tensor, **named: object) -> torch.Tensor:
        dtypes.append(query.dtype)
        return real(query, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    dice = torch.Generator().manual_seed(0)
    # Keys of which copies would be larger than all other memory of a step are not copied.
    monkeypatch.setattr(attention_kernels, "MOST_COPIED", 4 * (16 * MANY * 64 + 2 * 8 * 256 * 64 + MANY * 256))
    for queries, keys, wide in ((MANY - 1, 256, False), (MANY, MANY, True), (MANY, 256, True), (MANY, 257, False)):
        query = torch.randn((1, 16, queries, 64), generator=dice).bfloat16()
        key, value = torch.randn((2, 1, 8, keys, 64), generator=dice).bfloat16()
        mask = kernels.causal_mask(queries, keys, torch.bfloat16, query.device) if keys > queries else None
        dtypes.clear()
        out = kernels.causal_attention(query, key, value, mask)
        assert dtypes == [torch.float32 if wide and winner == "float32" else torch.bfloat16]
        assert out.dtype is torch.bfloat16
        torch.testing.assert_close(out, plain.causal_attention(query, key, value, mask), atol=2e-2, rtol=2e-2)


def test_it_is_measured_once_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real measurement, of few rows: which way wins is the machine's."""
    monkeypatch.setattr(attention_times, "DECODE_ROWS", {256: (1, 8)})
    heads = Heads(4, 2, 16)
    measured = measured_choice(heads, torch.bfloat16, decodes=True)
    assert set(measured.decode) == {256}
    assert set(measured.decode[256]) <= set(DECODE_ATTENTION)
    assert measured.prompt in PROMPT_ATTENTION
    monkeypatch.setattr(kernel_times, "_memo", {})
    for name in ("_measure_decode", "_measure_prompt"):
        monkeypatch.setattr(attention_times, name, lambda *_: pytest.fail("measured again"))
    threads = torch.get_num_threads()
    name = f"{heads} bfloat16 {threads} thread{'s' if threads > 1 else ''}"
    assert attention_times.known_choices() == {name: measured}
    assert measured_choice(heads, torch.bfloat16, decodes=True) == measured
    assert kernel_report.summary() is None, "attention alone is no measurement of weights"


def test_small_models_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_measure_decode", "_measure_prompt"):
        monkeypatch.setattr(attention_times, name, lambda *_: pytest.fail("measured"))
    kernels = CpuKernels()
    kernels.choose_attention(Heads(4, 2, 32), torch.bfloat16, decodes=True)
    assert kernels.describe() == ""
    # Nor is what these kernels have no figures of.
    kernels.choose_attention(HEADS, torch.float16, decodes=True)
    assert kernels.describe() == ""


@pytest.mark.slow
@pytest.mark.parametrize("winner", DECODE_ATTENTION)
def test_greedy_texts_are_the_same_in_every_way(
    monkeypatch: pytest.MonkeyPatch,
    wins: Callable[[str], None],
    opened: Opener,
    bundled_reference: Reference,
    mixed_300: list[ChatRequest],
    winner: str,
) -> None:
    monkeypatch.setattr("qvl.backends.local.model.kernels.SMALL", 1)
    wins(winner)
    wanted = mixed_300[:24]
    backend = opened(max_num_batched_tokens=160)
    assert winner in backend.describe()
    assert backend.identity() == opened().identity()
    check(bundled_reference, answer_all(backend, wanted), [bundled_reference.generate(request) for request in wanted])
