"""Whether an engine knows the flags that stand after `--`, before docker starts a container that would end at once.

vLLM's are in vllm_flags.json: what its parser took in the versions named there. A flag counts as known if any of them
has it, since an image may be of either.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Final

from qvl.errors import ConfigError

PROGRAMS: Final = {"qvl": "qvl-serve", "vllm": "vllm serve"}


@cache
def of_vllm() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return (versions of vLLM, flags of `vllm serve` in any of them), without `--no-FLAG` where there is `--FLAG`."""
    body = json.loads(files("qvl.ascend").joinpath("vllm_flags.json").read_text(encoding="utf-8"))
    return tuple(body["vllm"]), frozenset(body["flags"])


def check(engine: str, words: Sequence[str], known: Iterable[str]) -> None:
    """Refuse the first of `words` that is a flag, but none of those that the engine knows.

    Raises:
        ConfigError: with the nearest flag, and the way to pass it on all the same.
    """
    names = frozenset(known)
    for word in words:
        if is_flag(word) and not _is_known(engine, word, names):
            flag = word.partition("=")[0]
            close = difflib.get_close_matches(_spelt(engine, flag), sorted(names), n=1, cutoff=0.6)
            first, last = of_vllm()[0][0], of_vllm()[0][-1]
            where = f"{PROGRAMS[engine]} ({first} to {last})" if engine == "vllm" else PROGRAMS[engine]
            said = f"did you mean {close[0]}?" if close else f"see {PROGRAMS[engine]} --help;"
            raise ConfigError(f"{where} has no flag {flag}", hint=f"{said} --skip-check flags passes it on")


def is_flag(word: str) -> bool:
    """True for what a parser takes for a flag: not a negative number, and not a text with blanks."""
    return bool(re.match(r"--?[A-Za-z]", word)) and not re.search(r"\s", word.partition("=")[0])


def _spelt(engine: str, flag: str) -> str:
    """Return a flag as the list has it: vLLM takes _ for -, and --FLAG.KEY or --FLAG+ for parts of a JSON value."""
    return flag.partition(".")[0].rstrip("+").replace("_", "-") if engine == "vllm" else flag


def _is_known(engine: str, word: str, names: frozenset[str]) -> bool:
    flag = _spelt(engine, word.partition("=")[0])
    if flag in names:
        return True
    if engine != "vllm":
        return False
    if flag.startswith("--no-") and f"--{flag[5:]}" in names:
        return True
    # argparse takes the beginning of a flag if it is of one alone; -O3 is vLLM's own short form.
    begins = [name for name in names if name.startswith(flag)] if flag.startswith("--") else []
    return len(begins) == 1 or bool(re.fullmatch(r"-O\w*", flag))
