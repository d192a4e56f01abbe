"""Weights in 8 bits that are kept: read by the next start, made again where they are damaged, no burden elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl.backends.local.model import int8_store, unpack_weights
from qvl.backends.local.model.int8_store import DamagedInt8Error, Int8Store, quantise
from qvl.backends.local.model.model_runner import Runner
from qvl.config import cache_folder
from qvl.errors import ConfigError
from tests.backends.local.checkpoints import random_mixture
from tests.backends.local.requests import ask
from tests.backends.local.test_equals_generate import answer_all
from tests.backends.local.test_kernels import weights

if TYPE_CHECKING:
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener


def kept_as(file: Path, codes: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> None:
    kept = load_file(file)
    kept = {"codes": kept["codes"] if codes is None else codes, "scale": kept["scale"] if scale is None else scale}
    save_file(kept, file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "a byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "a text": lambda file: file.write_text("{}"),
    "absent": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "of another shape": lambda file: kept_as(file, codes=load_file(file)["codes"][:, :8].contiguous()),
    "of another dtype": lambda file: kept_as(file, codes=load_file(file)["codes"].float()),
    "without a scale": lambda file: save_file({"codes": load_file(file)["codes"]}, file),
    "with scales that are none": lambda file: kept_as(file, scale=load_file(file)["scale"] * float("nan")),
}


def int8_folder() -> Path:
    (folder,) = (cache_folder() / "int8").iterdir()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_file_is_noticed(damage: str) -> None:
    weight = weights()[0]
    with Int8Store("sha256:one") as first:
        first.take("head", weight)
    assert torch.equal(Int8Store("sha256:one").take("head", weight).codes, quantise(weight).codes)
    DAMAGES[damage](int8_folder() / "head.safetensors")
    with pytest.raises(DamagedInt8Error, match=r"head.safetensors cannot be used: .+ \(delete the folder"):
        Int8Store("sha256:one").take("head", weight)


class TestWeightsKeptIn8Bits:
    @pytest.mark.slow
    def test_the_next_start_reads_them_and_answers_alike(
        self, opened: Opener, mixed_300: list[ChatRequest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = answer_all(opened(quantize="int8"), mixed_300[:6])
        assert not int8_folder().name.endswith(".part")
        monkeypatch.setattr(int8_store, "quantise", lambda *_: pytest.fail("quantised again"))
        second = answer_all(opened(quantize="int8"), mixed_300[:6])
        assert [result.text for result in second] == [result.text for result in first]

    def test_the_large_weights_are_then_not_read(self, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
        opened(quantize="int8")
        read = []
        take = unpack_weights._Tensors.take
        monkeypatch.setattr(unpack_weights._Tensors, "take", lambda self, key: (read.append(key), take(self, key))[1])
        opened(quantize="int8")
        assert read
        assert not [key for key in read if "_proj" in key and "language_model" in key]

    @pytest.mark.parametrize("damage", [pytest.param("cut off", marks=pytest.mark.slow), "absent"])
    def test_damaged_files_are_made_again(self, opened: Opener, damage: str) -> None:
        right = answer_all(opened(quantize="int8"), [ask("Say hello.")])[0].text
        file = int8_folder() / "0.qkv.safetensors"
        whole = file.read_bytes()
        DAMAGES[damage](file)
        assert answer_all(opened(quantize="int8"), [ask("Say hello.")])[0].text == right
        assert file.read_bytes() == whole

    def test_what_cannot_be_removed_is_one_line_with_the_way_out(
        self, opened: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened(quantize="int8")
        file = int8_folder() / "0.qkv.safetensors"
        file.write_bytes(file.read_bytes()[:40])
        monkeypatch.setattr(int8_store.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ConfigError, match=r"0.qkv.safetensors cannot be used: .* \(delete the folder"):
            opened(quantize="int8")

    def test_where_nothing_can_be_written_it_works_all_the_same(self, opened: Opener) -> None:
        cache_folder().parent.mkdir(parents=True)
        cache_folder().write_text("a file")
        assert answer_all(opened(quantize="int8"), [ask("Say hello.")])[0].text

    def test_what_a_failed_start_wrote_is_removed(self, monkeypatch: pytest.MonkeyPatch, opened: Opener) -> None:
        def fails(self: Runner, checkpoint: Checkpoint, *_: object) -> None:
            assert checkpoint.int8 is not None
            checkpoint.int8.take("head", weights()[0])
            assert list((cache_folder() / "int8").iterdir())
            raise MemoryError

        monkeypatch.setattr(Runner, "__init__", fails)
        with pytest.raises(MemoryError):
            opened(quantize="int8")
        assert not list((cache_folder() / "int8").iterdir())

    def test_mixtures_are_refused(self, opened: Opener, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"quantize='int8' takes no mixture of experts \(leave it out\)"):
            opened(random_mixture(tmp_path / "mixture"), quantize="int8")
