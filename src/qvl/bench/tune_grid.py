"""What `qvl tune` varies: flags with their values, checked before a server is started, and the built-in grids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qvl.errors import ConfigError

PRESENT, ABSENT = "+", "-"
TENSOR, DATA = "--tensor-parallel-size", "--data-parallel-size"
SHORT: Final = {"-tp": TENSOR, "-dp": DATA}
GRAPH_MODES: Final = ("FULL_DECODE_ONLY", "PIECEWISE", "NONE", "FULL", "FULL_AND_PIECEWISE")
# FULL_DECODE_ONLY with these sizes is what `qvl launch` starts. The grid tries the first three modes.
_SIZES: Final = [1, 2, 4, 8, 16, 32]
_GRAPHS: Final = ";".join(
    json.dumps({"cudagraph_mode": mode} | ({} if mode == "NONE" else {"cudagraph_capture_sizes": _SIZES}))
    for mode in GRAPH_MODES[:3]
)
GRIDS: Final = {
    "vllm": (
        f"--compilation-config={_GRAPHS}",
        "--max-num-seqs=128,64,256",
        "--max-num-batched-tokens=16384,8192,32768",
        "--no-enable-prefix-caching=+,-",
        "--mm-processor-cache-gb=0,4",
        "--enforce-eager=-,+",
    ),
    "qvl": ("--max-num-seqs=16,8,32", "--goal=throughput,latency"),
}
_COUNTS: Final = (TENSOR, DATA, "--pipeline-parallel-size", "--max-num-seqs", "--max-num-batched-tokens")
_SHARES: Final = ("--gpu-memory-utilization",)


@dataclass(frozen=True, slots=True)
class Axis:
    """Flags of the server and their values, the one to start from first; `+` is the flag alone, `-` is without it.

    Several flags that are varied together stand in one: `--a*--b` with values `2*1` and `1*2`.
    """

    flag: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Axis:
        """Return the axis in a text such as `--max-num-seqs=8,16` or `--enforce-eager=-,+`.

        A value with commas, such as JSON, stands between semicolons: `--compilation-config={"a":1,"b":2};{"a":2}`.

        Raises:
            ConfigError: no flag, no value, a value twice, or one that the flag cannot have.
        """
        flag, given, rest = text.partition("=")
        values = tuple(value.strip() for value in rest.split(";" if ";" in rest else ","))
        flags = flag.split("*")
        if not given or not all(re.fullmatch(r"--[A-Za-z][\w.-]*", name) for name in flags) or not all(values):
            raise ConfigError(f"--vary {text!r} cannot be read", hint="as --vary --max-num-seqs=8,16,32")
        if len(set(flags)) != len(flags):
            raise ConfigError(f"--vary {text!r} has a flag twice", hint="name each once")
        axis = cls(flag, values)
        for value in values:
            parts = axis.parts(value)
            if len(parts) != len(flags):
                hint = f"as {'*'.join(['1'] * len(flags))}, a value a flag"
                raise ConfigError(f"--vary {flag}: {value!r} is not {len(flags)} values", hint=hint)
            for name, part in zip(flags, parts, strict=True):
                _check(name, part)
        if len(set(values)) != len(values):
            raise ConfigError(f"--vary {text!r} has a value twice", hint="name each once")
        return axis

    @property
    def flags(self) -> list[str]:
        """The flags, which are more than one where they are varied together."""
        return self.flag.split("*")

    def parts(self, value: str) -> list[str]:
        """Return the value of each of the flags."""
        return value.split("*") if "*" in self.flag else [value]

    def words(self, value: str) -> list[str]:
        """Return the words of the command line for one value."""
        words: list[str] = []
        for flag, part in zip(self.flags, self.parts(value), strict=True):
            words += [] if part == ABSENT else [flag] if part == PRESENT else [flag, part]
        return words


def grid(name: str, npus: int = 0) -> list[Axis]:
    """Return the axes of a built-in grid; with more than one of `npus`, vLLM's crosses tensor and data parallel first.

    Raises:
        ConfigError: there is no grid of that name.
    """
    if name not in GRIDS:
        raise ConfigError(f"unknown --grid {name!r}", hint=f"one of {', '.join(GRIDS)}")
    axes = [Axis.read(text) for text in GRIDS[name]]
    if name != "vllm" or npus < 2:
        return axes
    crossed = Axis(f"{TENSOR}*{DATA}", tuple(f"{tensor}*{data}" for tensor, data in parallel(npus)))
    return [crossed, *axes, Axis("--mm-encoder-tp-mode", ("weights", "data"))]


def parallel(npus: int) -> list[tuple[int, int]]:
    """Return (tensor, data) parallel sizes, powers of two, that take at most `npus`; those that take most first.

    Of those, the widest tensor parallel is first: it holds the largest model.
    """
    sizes = [2**power for power in range(npus.bit_length())]
    pairs = [(tensor, data) for tensor in sizes for data in sizes if tensor * data <= npus]
    return sorted(pairs, key=lambda pair: (-pair[0] * pair[1], -pair[0]))


def refuse_more_than(npus: int, axes: Sequence[Axis], command: Sequence[str]) -> None:
    """Raise ConfigError if some setting of `axes`, with the sizes in `command`, takes more than `npus`."""
    fixed = {TENSOR: 1, DATA: 1}
    for word, value in zip(command, [*command[1:], ""], strict=True):
        name, glued, own = word.partition("=")
        size = own if glued else value
        if (flag := SHORT.get(name, name)) in fixed and size.isdecimal():
            fixed[flag] = int(size)
    settings = [fixed]
    for axis in axes:
        chosen = [dict(zip(axis.flags, axis.parts(value), strict=True)) for value in axis.values]
        sizes = [
            {flag: int(size) for flag, size in one.items() if flag in fixed and size.isdecimal()} for one in chosen
        ]
        if any(sizes):
            settings = [before | one for before in settings for one in sizes]
    most = max(settings, key=lambda setting: setting[TENSOR] * setting[DATA])
    if (needed := most[TENSOR] * most[DATA]) > npus:
        said = f"{TENSOR} {most[TENSOR]} with {DATA} {most[DATA]} takes {needed} NPUs of {npus}"
        raise ConfigError(said, hint=f"vary both together: --vary '{TENSOR}*{DATA}=2*1,1*2'; or name more with --npus")


def _check(flag: str, value: str) -> None:
    """Refuse a value that no server would take, before minutes go into starting one with it."""
    if value in (PRESENT, ABSENT):
        if flag in (*_COUNTS, *_SHARES) and value == PRESENT:
            raise ConfigError(f"--vary {flag}: it needs a value, so {PRESENT} cannot stand", hint=f"as {flag}=8,16")
        return
    if flag in _COUNTS and not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise ConfigError(f"--vary {flag}: {value!r} is not a count", hint="a whole number from 1")
    if flag in _SHARES and not (re.fullmatch(r"[0-9]*\.?[0-9]+", value) and 0 < float(value) <= 1):
        raise ConfigError(f"--vary {flag}: {value!r} is not a share", hint="a number above 0 and at most 1")
    if value[0] in "{[" or value[-1] in "}]":
        _check_json(flag, value)
    if flag.endswith("cudagraph_mode"):
        _check_mode(flag, value)


def _check_json(flag: str, value: str) -> None:
    try:
        body = json.loads(value)
    except ValueError as exc:
        hint = "values with commas stand between semicolons: '{...};{...}'"
        raise ConfigError(f"--vary {flag}: {value!r} is not JSON", hint=hint) from exc
    if isinstance(body, dict) and "cudagraph_mode" in body:
        _check_mode(flag, body["cudagraph_mode"])


def _check_mode(flag: str, mode: object) -> None:
    if not isinstance(mode, str) or mode.upper() not in GRAPH_MODES:
        raise ConfigError(f"--vary {flag}: unknown cudagraph_mode {mode!r}", hint=f"one of {', '.join(GRAPH_MODES)}")
