"""What a made-up host has in place of this machine: sizes of file systems, limits, a matrix of today. No pytest."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from qvl.ascend import matrix
from qvl.ascend.host import Host

GIB = 2**30


@dataclass(frozen=True)
class SizedHost(Host):
    """A Host whose file systems and limits have stated sizes; everything else is the real class."""

    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    open_files: int = 65536

    def space(self, absolute: str) -> tuple[int, int] | None:
        return self.sizes.get(absolute, (500 * GIB, 200 * GIB))

    def open_files_limit(self) -> int:
        return self.open_files


def matrix_of_today() -> AbstractContextManager[None]:
    """The shipped matrix as if it were of today: tests must not turn red when it is 90 days old."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return matrix.use(matrix.load().model_copy(update={"date": today}))
