"""Unique ids, not secret: without a system call each, which would cost more than the rest of a cache hit."""

from __future__ import annotations

import itertools
import os
from typing import Final

_COUNT: Final = itertools.count()
_process = [os.urandom(8).hex()]


def _renew() -> None:
    _process[0] = os.urandom(8).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def new_id() -> str:
    """Return a unique id of 32 hexadecimal digits: the process, and a counter in it."""
    return f"{_process[0]}{next(_COUNT):016x}"


def new_request_id() -> str:
    return f"qvl-{new_id()}"
