"""`qvl doctor --explain CODE`: the cause and the way out of error codes of driver, CANN, HCCL and torch_npu.

The codes are data, in error_codes.json.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

# A number of three or fewer digits is HCCL's or a program's own, which says nothing without its place.
# Letters of other scripts may stand beside a code, as in a sentence without blanks.
_CODE = re.compile(
    r"(?<![A-Za-z0-9_.-])(-8[0-9]{3}|[1-5][0-9]{5}|E[A-Z][0-9]{4}|E[0-9]{5}|ERR[0-9]{5})(?![A-Za-z0-9_-])"
    # dcmi's codes are negative; where the text names one without its sign, a word before it says that it is one.
    r"|\b(?:ret|error|code|dcmi)[a-z_ ]*(?:=|:|is|\s)\s*(8[0-9]{3})(?![A-Za-z0-9_-]|\.[0-9])",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The meaning of an error code: its official name, the usual cause, and what to do, one line each."""

    code: str
    name: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} ({self.name}): {self.cause}\n     fix: {self.fix}"


@lru_cache(maxsize=1)
def known() -> dict[str, Explanation]:
    """Return all explanations by code."""
    body = json.loads(resources.files("qvl.ascend").joinpath("error_codes.json").read_text(encoding="utf-8"))
    return {code: Explanation(code, **facts) for code, facts in body["codes"].items()}


def codes_in(text: str) -> tuple[str, ...]:
    """Return all that looks like an error code in a code, a line or a whole log, each once, in the text's order."""
    found = ((code or f"-{unsigned}").upper() for code, unsigned in _CODE.findall(text))
    return tuple(dict.fromkeys(found))


def explanations(text: str) -> tuple[Explanation, ...]:
    """Return the explanations of the known codes in a text, the most telling first.

    The codes of parts that only pass an error on (`ERR00100`, `EE9999`) come last.
    """
    found = [known()[code] for code in codes_in(text) if code in known()]
    return tuple(sorted(found, key=lambda item: item.code.endswith("9999") or item.code.startswith("ERR")))
