"""Arrays and tensors of other libraries are pictures too, without loading those libraries."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from qvl import media
from qvl.errors import MediaError

LEVELS = np.random.default_rng(3).integers(0, 256, (20, 30, 3), np.uint8)


class ByCapsule:
    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __dlpack__(self, **options: object) -> object:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._values.__dlpack_device__()


class ByArray:
    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.array(self._values, dtype=dtype)


def test_arrays_of_other_libraries_are_read_by_what_they_offer() -> None:
    known = media.load(LEVELS)
    assert media.load(ByArray(LEVELS)) == known
    assert media.load(ByCapsule(LEVELS)) == known


def test_tensors_of_torch_in_either_order_are_read() -> None:
    torch = pytest.importorskip("torch")
    known = media.load(LEVELS)
    last = torch.from_numpy(LEVELS)
    first = last.permute(2, 0, 1)
    assert media.load(last) == media.load(first) == media.load(first.contiguous()) == known
    shares = first.float() / 255
    assert media.load(shares) == media.load(shares.double()) == media.load(shares.requires_grad_()) == known
    assert media.load(torch.nn.Parameter(shares.detach())) == known
    assert media.load(first[:1]) == media.load(last[:, :, 0]) == media.load(LEVELS[:, :, 0])
    assert media.load(torch.zeros(4, 20, 30, dtype=torch.uint8)).rgb().size == (30, 20)
    for short in (torch.bfloat16, torch.float16):
        picture = media.load(torch.full((3, 8, 9), 0.5, dtype=short))
        assert picture.rgb().getpixel((0, 0)) == (128, 128, 128)


def test_a_tensor_that_is_not_a_picture_is_refused_on_one_line() -> None:
    torch = pytest.importorskip("torch")
    for tensor, words in (
        (torch.zeros(3, 8, 8, dtype=torch.int64), "unsupported array dtype int64 for a picture"),
        (torch.zeros(2, 3, 8, 8), "unsupported array shape 2x3x8x8 for a picture"),
        (torch.full((3, 8, 8), 200.0), "values from 0 to 1"),
        (torch.zeros(3, 8, 8, device="meta"), "a Tensor cannot be read as an array"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "unsupported array dtype complex64 for a picture"),
        (torch.zeros(8, 8).to_sparse(), "a Tensor cannot be read as an array"),
    ):
        with pytest.raises(MediaError, match=words) as caught:
            media.load(tensor)
        assert "\n" not in str(caught.value)
        assert caught.value.hint


def test_a_picture_is_read_without_loading_torch() -> None:
    code = (
        "import sys, numpy; from qvl import media; media.load(numpy.zeros((8, 8), 'u1')); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_while_another_thread_imports_torch_pictures_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert media.load(np.zeros((8, 8, 3), np.uint8)).width == 8
    assert media.load(Path("examples/pictures/norvik-mug-red.png")).width
