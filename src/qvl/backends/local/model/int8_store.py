"""Weights in 8 bits, kept in qvl's cache folder, so that the next start neither reads nor quantises the large ones."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeVar

from qvl.config import cache_folder
from qvl.errors import ConfigError, first_line
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

T = TypeVar("T")
log = logger(__name__)
# Changes with what is quantised, and how.
RECIPE: Final = 1
# The weights of the checkpoint that are kept here instead, but for the output layer where that is the embedding too.
_QUANTISED: Final = re.compile(
    r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$|^lm_head\.weight$"
)


class DamagedInt8Error(ConfigError):
    """A file in `folder` is damaged or of another weight. Without the folder all are read and quantised again."""

    folder: Path


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [out, in] as int8 `codes` times float32 `scale` [out]."""

    codes: Tensor
    scale: Tensor


def again_if_damaged(load: Callable[[], T]) -> T:
    """Return what `load` returns; if kept weights are damaged, remove them and load once more.

    Raises:
        DamagedInt8Error: they cannot be removed.
    """
    try:
        return load()
    except DamagedInt8Error as exc:
        shutil.rmtree(exc.folder, ignore_errors=True)
        if exc.folder.exists():
            raise
        log.warning("int8_weights_damaged", error=exc.message, now="quantised again")
    return load()


def quantise(weight: Tensor) -> Int8Weight:
    """Return the weight [out, in] in 8 bits, symmetrically, the largest number of each output being 127."""
    import torch

    single = weight.float()
    scale = single.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
    return Int8Weight((single / scale[:, None]).round_().to(torch.int8), scale)


class Int8Store:
    """The quantised weights of one checkpoint by name, a file for each.

    As a context manager, it keeps what `take` wrote when the block ends without an error.

    Args:
        fingerprint: of the checkpoint.
    """

    def __init__(self, fingerprint: str) -> None:
        self._folder = cache_folder() / "int8" / f"{fingerprint.removeprefix('sha256:')[:32]}-{RECIPE}"
        self._draft = self._folder.with_name(f"{self._folder.name}.{os.getpid()}.part")
        self._writes = True

    @property
    def complete(self) -> bool:
        """True if all weights are here, so that `take` returns each."""
        return self._folder.is_dir()

    def replaces(self, name: str, *, tied: bool) -> bool:
        """True if the checkpoint's weight `name` need not be read; `tied`: the output layer is the embedding."""
        return self.complete and _QUANTISED.search(name) is not None and not (tied and name == "lm_head.weight")

    def take(self, name: str, weight: Tensor) -> Int8Weight:
        """Return the weight `name` in 8 bits: as it was kept, else quantised now, and kept. Thread-safe.

        Raises:
            DamagedInt8Error: a file is absent, damaged, or of another weight.
        """
        from safetensors.torch import load_file, save_file

        file = f"{name}.safetensors"
        if self.complete:
            path = self._folder / file
            try:
                kept = load_file(path)
                made = Int8Weight(kept["codes"], kept["scale"])
                if made.codes.shape != weight.shape or made.scale.shape != weight.shape[:1]:
                    raise ValueError(f"a weight of {list(made.codes.shape)} instead of {list(weight.shape)}")
                if (str(made.codes.dtype), str(made.scale.dtype)) != ("torch.int8", "torch.float32"):
                    raise ValueError(f"numbers of {made.codes.dtype} and {made.scale.dtype}")
                if not bool(((made.scale > 0) & made.scale.isfinite()).all()):
                    raise ValueError("a scale that is not a positive number")
            except Exception as exc:
                # Anything else that safetensors raises.
                error = DamagedInt8Error(
                    f"{path} cannot be used: {first_line(exc)}", hint=f"delete the folder {self._folder}"
                )
                error.folder = self._folder
                raise error from exc
            return made
        made = quantise(weight)
        if self._writes:
            try:
                self._draft.mkdir(parents=True, exist_ok=True)
                save_file({"codes": made.codes, "scale": made.scale}, self._draft / file)
            except Exception:  # noqa: BLE001 - a full disk, a folder that is not ours: then nothing is kept
                self._discard()
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep what was written if the model has got all its weights, else remove it."""
        if kind is None and self._draft.is_dir():
            with suppress(OSError):  # another process was faster
                self._draft.rename(self._folder)
        self._discard()

    def _discard(self) -> None:
        """Remove what was written and not kept, and write no more."""
        self._writes = False
        shutil.rmtree(self._draft, ignore_errors=True)
