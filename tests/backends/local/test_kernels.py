"""Kernels for matrix products: the same numbers from all, the fastest by measurement, and 8 bits row by row."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from typing import TYPE_CHECKING

import pytest
import torch

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model import cpu, int8_store, kernel_race, kernel_report, kernel_times
from qvl.backends.local.model.int8_store import quantise
from qvl.backends.local.model.kernel_times import ROWS, Times
from qvl.backends.local.model.linear import SMALL, LinearPlan, best_layouts
from qvl.backends.local.model.linear_kernels import INT8_KERNELS, KERNELS, LinearKernel
from qvl.backends.local.model.linear_kernels import pack as pack_numbers
from qvl.config import cache_folder
from qvl.errors import ConfigError
from tests.backends.local.reference import Reference
from tests.backends.local.test_equals_generate import answer_all, check

if TYPE_CHECKING:
    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener

TOLERANCE = {"plain": 1e-6, "onednn": 1e-6, "fbgemm": 1e-6, "onednn-int8": 0.02, "fbgemm-int8": 0.02}


# Valid JSON and other texts in the place of the measurements; HERE is this processor.
HOSTILE_FILES = [
    "",
    "{",
    "[]",
    "7",
    "null",
    '{"a": 1}',
    "\x00",
    "[" * 100_000,
    '{"HERE": []}',
    '{"HERE": {"read_gb_s": "33", "dtype": "float64", "times": []}}',
    '{"HERE": {"read_gb_s": NaN, "dtype": 1, "times": {"64x32 float32 1 thread": 5}}}',
    '{"HERE": {"read_gb_s": -1, "dtype": ["float32"], "times": {"64x32 float32 1 thread": {"plain": 5}}}}',
    '{"HERE": {"read_gb_s": true, "times": {"64x32": {"plain": {"1": 1}}, "axb float32 1 thread": {}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"plain": {}, "onednn": {}, "fbgemm": {}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"plain": {"1": "2"}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"plain": {"one": 2}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"plain": {"1": 0}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"other": {"1": 2, "8": 2, "32": 2, "256": 2}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"plain": {"1": 1e999}}}}}',
    '{"HERE": {"times": {"1024x2048 float32 1 thread": {"grouped": {"1": 2}, "2": {"1": 2}}}}}',
    '{"HERE": {"times": {"decode 16/8x128 float32 1 thread": {"plain": {"1": 2}}}}}',
    '{"HERE": {"times": {"decode 16/8x128 over 0 float32 1 thread": {"grouped": {"1": 2}}}}}',
    '{"HERE": {"times": {"threads 64x32 float32 1 thread": {"0": {"1": 2}, "plain": {"1": 2}}}}}',
    '{"HERE": {"read_gb_s": ' + "9" * 5000 + "}}",
    '{"HERE": {"read_gb_s": 33}, "pad": "' + "x" * (5 << 20) + '"}',
]


@pytest.fixture
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process; what this one measured comes back. Others leave it the processor, whatever they do."""
    monkeypatch.setattr(kernel_times, "_memo", {})
    monkeypatch.setattr(kernel_times, "_passing", {})
    monkeypatch.setattr(kernel_race, "ALONE", 0.0)
    monkeypatch.setattr(kernel_race.clock, "left", kernel_race.MOST_SECONDS)
    monkeypatch.setattr(kernel_times, "is_busy", lambda: False)


def weights(out: int = 96, width: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a bias whose numbers float16 and bfloat16 hold."""
    dice = torch.Generator().manual_seed(1)
    weight, bias = torch.randn((out, width), generator=dice) * 0.1, torch.randn(out, generator=dice)
    return weight.bfloat16().half().to(dtype), bias.bfloat16().to(dtype)


def pack(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
    return pack_numbers(name, quantise(weight) if name in INT8_KERNELS else weight, bias)


def rows(count: int, width: int = 64) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(count))


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*KERNELS, *INT8_KERNELS])
def test_every_kernel_gives_the_product_at_every_number_of_rows(name: str, dtype: torch.dtype) -> None:
    weight, bias = weights(dtype=dtype)
    tolerance = max(TOLERANCE[name], 0.01 if dtype is torch.bfloat16 else 0)
    for offset in (None, bias):
        kernel = pack(name, weight, offset)
        if kernel is None:
            pytest.skip(f"this torch or processor has no {name}")
        for count in (1, 2, 3, 5, 8, 33, 70):
            x = rows(count).to(dtype)
            exact = torch.nn.functional.linear(x.float(), weight.float(), None if offset is None else offset.float())
            base = rows(count, 96).to(dtype)
            assert kernel(x).dtype is dtype
            assert error(kernel(x), exact) < tolerance
            assert error(kernel.gelu(x, "tanh"), torch.nn.functional.gelu(exact, approximate="tanh")) < 2 * tolerance
            assert error(kernel.added_to(base.clone(), x), exact + base.float()) < tolerance


@pytest.mark.parametrize("name", INT8_KERNELS)
def test_in_8_bits_a_row_depends_on_no_other_row(name: str) -> None:
    weight, bias = weights()
    kernel = pack(name, weight, bias)
    if kernel is None:
        pytest.skip(f"this torch or processor has no {name}")
    x = rows(40)
    x[7] *= 1000  # would take all steps of a scale that is shared
    x[8] = 0
    together = kernel(x)
    for index in (0, 6, 7, 8, 39):
        assert torch.equal(kernel(x[index : index + 1])[0], together[index])
    assert error(together[7], torch.nn.functional.linear(x[7], weight, bias)) < 0.02
    assert torch.equal(together[8], bias)


def test_the_8_bits_are_7_where_sums_would_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.backends.local.model.linear_kernels.has_vnni", lambda: False)
    # Products of one sign and full size: pairs of them pass the range of 16 bits.
    weight, x = torch.full((16, 64), 0.5), torch.full((3, 64), 2.0)
    for name in INT8_KERNELS:
        kernel = pack(name, weight, None)
        if kernel is not None:
            assert error(kernel(x), x @ weight.t()) < 0.02


def test_weights_that_float16_does_not_hold_are_not_halved() -> None:
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(0))
    assert pack("fbgemm", weight, None) is None
    assert pack("fbgemm", torch.full((4, 4), 1e6), None) is None
    # Without choice it is an error, with one another kernel is taken.
    with pytest.raises(ConfigError, match="decode_kernel='fbgemm' does not work with these weights"):
        LinearPlan("fbgemm").linear(weight, name="head")
    linear = LinearPlan().linear(weight, name="head")
    assert error(linear(rows(3)), rows(3) @ weight.t()) < 1e-6


def times(**by_name: tuple[float, ...]) -> Times:
    return {name: dict(zip(ROWS, of, strict=True)) for name, of in by_name.items()}


def test_the_fastest_kernel_is_taken_at_each_number_of_rows() -> None:
    measured = times(plain=(9, 9, 9, 9, 9, 9, 9, 90), fast=(1, 1, 2, 4, 8, 24, 48, 300), wide=(5, 5, 5, 5, 5, 5, 6, 50))
    assert best_layouts(measured, second=True) == ("fast",) * 4 + ("wide",) * 4
    # Memory for one layout: the one that loses least over all numbers of rows, relative to the best at each.
    assert set(best_layouts(measured, second=False)) == {"wide"}
    assert set(best_layouts(measured, second=False, tiled=True)) == {"wide"}


def test_a_second_layout_must_be_worth_it() -> None:
    nearly = times(plain=(10,) * 8, other=(9.5,) * 7 + (11,))
    assert len(set(best_layouts(nearly, second=True))) == 1


def test_nothing_is_slower_than_the_general_kernel_where_that_is_best() -> None:
    measured = times(plain=(1,) * 8, other=(2,) * 8)
    assert set(best_layouts(measured, second=True)) == {"plain"}


def test_at_no_number_of_rows_are_the_layouts_slower_than_the_general_kernel() -> None:
    # Best on the whole would be the other two, or one of them, but for one number of rows.
    measured = times(plain=(9, 9, 9, 9, 9, 5, 9, 90), fast=(1, 1, 2, 4, 8, 24, 48, 300), wide=(5, 5, 5, 5, 5, 8, 6, 50))
    for second in (True, False):
        names = best_layouts(measured, second=second)
        taken = [measured[name][count] for name, count in zip(names, ROWS, strict=True)]
        assert all(ms <= plain for ms, plain in zip(taken, measured["plain"].values(), strict=True)), names
    assert set(names) == {"plain"}
    # Less than a twentieth is noise.
    measured["wide"][32] = 5.2
    assert set(best_layouts(measured, second=False)) == {"wide"}


def test_only_prompts_are_timed_for_a_weight_of_pictures() -> None:
    measured: Times = {"plain": {256: 3.0}, "onednn": {256: 2.0}}
    assert best_layouts(measured, second=False) == ("onednn",) * len(ROWS)


@pytest.mark.usefixtures("_nothing_measured")
class TestKeptTimes:
    def test_they_are_measured_once_and_read_by_the_next_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = kernel_times.kernel_times((64, 32), torch.float32, ("plain", "onednn"), (1, 8))
        assert set(measured["plain"]) == {1, 8}
        assert all(ms > 0 for of in measured.values() for ms in of.values())
        monkeypatch.setattr(kernel_times, "_memo", {})
        monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured again"))
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain", "onednn"), (1, 8)) == measured

    @pytest.mark.parametrize("content", HOSTILE_FILES)
    def test_a_file_that_holds_no_measurements_is_replaced(self, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
        def measure(size: object, dtype: object, names: tuple[str, ...], counts: tuple[int, ...]) -> Times:
            return {name: dict.fromkeys(counts, 1.0) for name in names}

        monkeypatch.setattr(kernel_times, "measure_products", measure)
        file = cache_folder() / "kernels.json"
        file.parent.mkdir(parents=True)
        file.write_text(content.replace("HERE", kernel_times._processor()))
        assert kernel_times.known_dtype() in (None, "float32")
        assert kernel_report.summary() is None
        assert kernel_times.known_bandwidth() is None
        assert kernel_times.faster_dtype() in ("float32", "bfloat16")
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,))["plain"][1] > 0
        assert LinearPlan().linear(weights()[0], name="head")(rows(2)).shape == (2, 96)
        assert json.loads(file.read_text())[kernel_times._processor()]["times"]

    def test_what_is_right_beside_it_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,))
        file = cache_folder() / "kernels.json"
        saved = json.loads(file.read_text())
        saved[kernel_times._processor()] |= {"read_gb_s": "fast", "later": {}}
        file.write_text(json.dumps(saved | {"another processor": []}))
        monkeypatch.setattr(kernel_times, "_memo", {})
        monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured again"))
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,))
        assert kernel_times.known_bandwidth() is None

    @pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable", "device"])
    def test_what_cannot_be_read_is_passed_over(self, kind: str) -> None:
        file = cache_folder() / "kernels.json"
        file.parent.mkdir(parents=True)
        if kind == "folder":
            (file / "inner").mkdir(parents=True)
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            file.write_text("{}")
            file.chmod(0)
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,))
        assert not list(file.parent.glob(".kernels.json*")), "no draft stays behind"

    def test_a_folder_that_cannot_be_written_costs_nothing_but_the_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_times, "measure_products", lambda size, dtype, names, rows: {"plain": {1: 0.5}})
        speeds = iter((7e9,))
        monkeypatch.setattr(kernel_times, "host_bandwidth", lambda: next(speeds))
        cache_folder().parent.mkdir(parents=True)
        cache_folder().write_text("a file")
        for _ in range(2):
            assert kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,)) == {"plain": {1: 0.5}}
            assert kernel_times.read_bandwidth() == kernel_times.known_bandwidth() == 7.0
            monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured again"))
        assert cache_folder().read_text() == "a file"

    def test_a_kernel_that_fails_is_not_taken_and_not_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> object:
            raise RuntimeError("could not create a primitive")

        monkeypatch.setitem(KERNELS, "onednn", fails)
        for _ in range(2):
            assert set(kernel_times.kernel_times((64, 32), torch.float32, ("plain", "onednn"), (1,))) == {"plain"}

    def test_times_that_others_disturbed_serve_this_process_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """But for the standard weight's, by which all processes decide the same dtype."""
        monkeypatch.setattr(kernel_race, "ALONE", math.inf)
        measured = kernel_times.kernel_times((64, 32), torch.float32, ("plain", "onednn"), (1, 8))
        assert set(measured["plain"]) == {1, 8}
        file = cache_folder() / "kernels.json"
        assert not file.exists()
        kernel_times.kernel_times(kernel_times.STANDARD, torch.float32, ("plain",), (1,))
        assert list(json.loads(file.read_text())[kernel_times._processor()]["times"]) == [
            kernel_times.name_of(kernel_times.STANDARD_NAME, torch.float32)
        ]
        monkeypatch.setattr(kernel_times, "is_busy", lambda: True)
        monkeypatch.setattr(kernel_times, "host_bandwidth", lambda: 7e9)
        assert kernel_times.read_bandwidth() == kernel_times.known_bandwidth() == 7.0
        assert "read_gb_s" not in file.read_text()
        monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured again"))
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain", "onednn"), (1, 8)) == measured

    def test_where_others_take_the_processor_the_time_that_a_kernel_had_it_counts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernel_race, "ALONE", 0.9)
        # Nothing runs while a thread sleeps, as while others do.
        took, alone = kernel_race.Clock().time(lambda: time.sleep(0.2))
        assert not alone
        assert took < 0.1

    def test_disturbed_times_stand_before_kept_ones_of_fewer_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def measure(size: object, dtype: object, names: tuple[str, ...], counts: tuple[int, ...]) -> Times:
            kernel_race.clock.disturbed = len(asked) == 1
            asked.append(counts)
            return {name: dict.fromkeys(counts, float(len(asked))) for name in names}

        def times(*counts: int) -> dict[int, float]:
            return kernel_times.kernel_times((64, 32), torch.float32, ("plain",), counts)["plain"]

        monkeypatch.setattr(kernel_times, "measure_products", measure)
        assert times(256) == {256: 1.0}
        assert times(1, 256) == times(1, 256) == {1: 2.0, 256: 2.0}
        assert times(1, 8, 256) == times(1, 8, 256) == {1: 3.0, 8: 3.0, 256: 3.0}
        assert asked == [(256,), (1, 256), (1, 8, 256)]
        (kept,) = json.loads((cache_folder() / "kernels.json").read_text())[kernel_times._processor()]["times"].values()
        assert kept == {"plain": {"256": 3.0, "1": 3.0, "8": 3.0}}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_once_the_time_is_over_the_rest_is_not_measured(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(kernel_times, "has_bfloat16", lambda: True)
        monkeypatch.setattr(kernel_race.clock, "left", 1e-9)
        monkeypatch.setattr("qvl.backends.local.model.linear.SMALL", 1)
        assert kernel_times.kernel_times((64, 32), dtype, ("plain", "onednn")) == {}
        monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("went on"))
        weight, bias = weights(dtype=dtype)
        plan = LinearPlan(threads=1)
        linear = plan.linear(weight, bias, name="head")
        assert (
            error(linear(rows(3).to(dtype)), torch.nn.functional.linear(rows(3), weight.float(), bias.float())) < 0.01
        )
        assert "GB/s" not in plan.describe()
        assert kernel_times.faster_dtype() == "bfloat16"
        assert kernel_times.known_dtype() is None, "the next process measures"
        assert not (cache_folder() / "kernels.json").exists()

    def test_a_measurement_without_memory_does_not_stop_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(*_: object) -> Times:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(kernel_times, "measure_products", measure)
        assert kernel_times.kernel_times((64, 32), torch.float32, ("plain",)) == {}

    def test_what_another_process_wrote_meanwhile_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(size: object, dtype: object, names: tuple[str, ...], counts: tuple[int, ...]) -> Times:
            return {name: dict.fromkeys(counts, 1.0) for name in names}

        monkeypatch.setattr(kernel_times, "measure_products", measure)
        kernel_times.kernel_times((64, 32), torch.float32, ("plain",), (1,))
        # The other one began when there was no file.
        mine, _ = kernel_times._memo, monkeypatch.setattr(kernel_times, "_memo", {kernel_times._processor(): {}})
        kernel_times.kernel_times((96, 32), torch.float32, ("plain",), (1,))
        written = json.loads((cache_folder() / "kernels.json").read_text())[kernel_times._processor()]["times"]
        assert {name.split()[0] for name in written} == {"64x32", "96x32"}
        assert "96x32" not in str(mine)

    def test_auto_is_the_dtype_whose_kernels_are_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_times, "has_bfloat16", lambda: True)
        # A difference as small as noise decides nothing: two processes must agree.
        for times, faster in (((2.0, 1.0), "float32"), ((1.0, 2.0), "bfloat16"), ((1.1, 1.0), "bfloat16")):
            monkeypatch.setattr(kernel_times, "_memo", {})
            (cache_folder() / "kernels.json").unlink(missing_ok=True)
            assert kernel_times.known_dtype() is None

            def measure(
                size: tuple[int, int], dtype: torch.dtype, names: tuple[str, ...], counts: tuple[int, ...]
            ) -> Times:
                ms = times[dtype is torch.float32]  # noqa: B023 - called in this round
                return {name: dict.fromkeys(counts, ms) for name in names}

            monkeypatch.setattr(kernel_times, "measure_products", measure)
            assert kernel_times.faster_dtype() == kernel_times.known_dtype() == faster

    def test_the_process_that_decided_first_decides_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(size: object, dtype: object, names: tuple[str, ...], counts: tuple[int, ...]) -> Times:
            file = cache_folder() / "kernels.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({kernel_times._processor(): {"dtype": "float32"}}))
            return {name: dict.fromkeys(counts, 1.0) for name in names}

        monkeypatch.setattr(kernel_times, "has_bfloat16", lambda: True)
        monkeypatch.setattr(kernel_times, "measure_products", measure)
        monkeypatch.setattr(kernel_times, "_write", lambda: None)
        assert kernel_times.faster_dtype() == "float32"

    def test_without_instructions_for_bfloat16_nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_times, "has_bfloat16", lambda: False)
        monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured"))
        assert kernel_times.faster_dtype() == kernel_times.known_dtype() == "float32"


@pytest.mark.parametrize("lacking", [None, *INT8_KERNELS])
def test_small_weights_in_8_bits_are_not_measured(monkeypatch: pytest.MonkeyPatch, lacking: str | None) -> None:
    monkeypatch.setattr(kernel_times, "measure_products", lambda *_: pytest.fail("measured"))
    available = {name: INT8_KERNELS[name] for name in INT8_KERNELS if name != lacking}
    monkeypatch.setattr("qvl.backends.local.model.linear.INT8_KERNELS", available)
    plan = LinearPlan(int8=int8_store.Int8Store("sha256:small"))
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias = weights(dtype=dtype)
        linear = plan.linear(weight, bias, name=f"{dtype}")
        exact = torch.nn.functional.linear(rows(3), weight.float(), bias.float())
        assert error(linear(rows(3).to(dtype)), exact) < 0.02
    assert "int8" in plan.describe()
    assert "GB/s" not in plan.describe(), "what stays in the caches says nothing of the memory"


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_measured")
def test_a_large_weight_has_measured_kernels_and_says_so() -> None:
    plan = LinearPlan()
    weight = weights(2048, SMALL // 2048)[0]
    linear = plan.linear(weight, name="head")
    for count in (1, 9, 300):
        x = rows(count, weight.shape[1])
        assert error(linear(x), x @ weight.t()) < 1e-5
    assert "GB/s" in plan.describe()


def test_the_processor_is_read_from_its_own_description(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model name\t: Some Xeon\ncpu family\t: 6\nmodel\t\t: 143\nflags\t\t: fpu amx_bf16 amx_int8\n"
    monkeypatch.setattr(cpu, "cpu_info", lambda: text)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert cpu.cpu_name() == "Some Xeon 6 143"
    assert cpu.has_bfloat16()
    assert cpu.has_vnni()
    monkeypatch.setattr(cpu, "cpu_info", lambda: "model name\t: Old\nflags\t\t: fpu avx2\n")
    assert not cpu.has_bfloat16()
    assert not cpu.has_vnni()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_greedy_texts_are_the_same_with_every_kernel(
    opened: Opener, bundled_reference: Reference, mixed_300: list[ChatRequest], kernel: str
) -> None:
    wanted = mixed_300[:10]
    backend = opened(decode_kernel=kernel, max_num_batched_tokens=160)
    assert kernel in backend.describe()
    check(bundled_reference, answer_all(backend, wanted), [bundled_reference.generate(request) for request in wanted])


@pytest.mark.slow
def test_8_bits_leave_the_bundled_models_answers_as_they_are(
    opened: Opener, bundled_reference: Reference, mixed_300: list[ChatRequest]
) -> None:
    backend = opened(quantize="int8")
    assert backend.identity()["quantisation"] == "int8"
    assert "int8" in backend.describe()
    wanted = mixed_300[:24]
    texts = [
        bundled_reference.tokenizer.decode(bundled_reference.generate(request), skip_special_tokens=True)
        for request in wanted
    ]
    results = answer_all(backend, wanted)
    same = sum(result.text == text for result, text in zip(results, texts, strict=True))
    assert same >= 0.9 * len(wanted)
    # Alone or in company, the answer is the same.
    assert asyncio.run(backend.generate(wanted[3])).text == results[3].text


@pytest.mark.parametrize(("kernel", "named"), [("auto", None), ("plain", "plain"), ("fbgemm", "fbgemm")])
def test_a_kernel_that_was_forced_is_part_of_the_identity_and_the_measured_one_is_not(
    opened: Opener, kernel: str, named: str | None
) -> None:
    peeked = LocalBackend(device="cpu", dtype="float32", decode_kernel=kernel).peek_identity()
    assert peeked is not None
    assert peeked.get("decode_kernel") == named
    assert opened(decode_kernel=kernel).identity() == peeked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_kernel": "mkl"}, "unknown decode_kernel 'mkl' (auto, plain, onednn, fbgemm)"),
        ({"quantize": "int3"}, "unknown quantize 'int3' (int8, or leave it out)"),
        ({"quantize": "int8", "decode_kernel": "fbgemm"}, "quantize excludes decode_kernel (leave one of them out)"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalBackend(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message
