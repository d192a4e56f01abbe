"""Which way of computing attention is taken, by measurement on this processor; the times are kept by `kernel_times`."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from qvl.backends.local.model.attention_kernels import DECODE_ATTENTION, PROMPT_ATTENTION
from qvl.backends.local.model.kernel_race import race
from qvl.backends.local.model.kernel_times import ATTENTION, ROWS, Times, by_rows, kept_times, known_times

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from qvl.types import JsonObject

# Numbers of all query heads together. The attention of smaller models is not measured.
SMALL: Final = 512
# The numbers of rows that are timed, by the tokens that a KV row can hold; of more and longer rows the largest count.
DECODE_ROWS: Final = {256: (1, 8, 32), 2048: (1, 8)}
# How many queries of a prompt or picture are timed, over how many keys.
PROMPT: Final = (256, 512)
# Share of the time that another way must save to be taken: less is noise, by which processes would differ.
WORTH: Final = 0.1


class Heads(NamedTuple):
    """The shape of attention: numbers of query heads and of key heads, and the numbers of a head."""

    query: int
    key: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key}x{self.dim}"


class AttentionChoice(NamedTuple):
    """The ways that are taken for attention of one shape.

    Args:
        decode: name of that for steps that decode, for each of ROWS, by the capacity of KV rows; empty if none does.
        prompt: name of that for many queries.
    """

    decode: dict[int, tuple[str, ...]]
    prompt: str

    def of_rows(self, rows: int, capacity: int) -> str:
        """Return the name of the way for a decode step of `rows` KV rows that can hold `capacity` tokens."""
        sizes = list(self.decode)
        names = self.decode[sizes[min(bisect_left(sizes, capacity), len(sizes) - 1)]]
        return names[min(bisect_left(ROWS, rows), len(ROWS) - 1)]

    def describe(self) -> str:
        """Return in words what is taken."""
        decode = " or ".join(dict.fromkeys(name for names in self.decode.values() for name in names))
        return f"attention of steps {decode}" + (", of prompts in float32" if self.prompt == "float32" else "")

    def detail(self) -> JsonObject:
        """Return the same by the capacity of KV rows and the number of rows."""
        return {**{f"{tokens} tokens": by_rows(names) for tokens, names in self.decode.items()}, "prompts": self.prompt}


def measured_choice(heads: Heads, dtype: torch.dtype, *, decodes: bool) -> AttentionChoice:
    """Return what is fastest here for `heads` in `dtype`. Blocking: a second where that was never measured.

    `decodes` is False where prompts or pictures are all there is.
    """
    decode: dict[int, tuple[str, ...]] = {}
    for capacity, rows in DECODE_ROWS.items() if decodes else ():
        measure = partial(_measure_decode, heads, dtype, capacity)
        times = kept_times(f"decode {heads} over {capacity}", dtype, tuple(DECODE_ATTENTION), rows, measure)
        decode[capacity] = fastest(times, rows)
    return AttentionChoice(decode, _prompt(heads, dtype))


def known_choices() -> dict[str, AttentionChoice]:
    """Return what was measured here before and decodes, by shape, as "16/8x128 bfloat16 2 threads"; without torch."""
    known = known_times(ATTENTION)
    found: dict[str, AttentionChoice] = {}
    for what in known:
        kind, heads, *_, dtype, threads, word = what.split()
        name = f"{heads} {dtype} {threads} {word}"
        if kind != "decode" or name in found:
            continue
        decode = {
            capacity: fastest(times, rows)
            for capacity, rows in DECODE_ROWS.items()
            if (times := known.get(f"decode {heads} over {capacity} {dtype} {threads} {word}"))
        }
        prompt = known.get(f"prompt {heads} {dtype} {threads} {word}")
        found[name] = AttentionChoice(
            decode, fastest(prompt, PROMPT[:1])[0] if prompt else next(iter(PROMPT_ATTENTION))
        )
    return {name: choice for name, choice in found.items() if choice.decode}


def fastest(times: Times, rows: Sequence[int]) -> tuple[str, ...]:
    """Return the name for each of ROWS, of which `rows` were timed: the first one's unless another saves WORTH."""
    first = next(iter(times), "grouped")
    chosen = []
    for count in rows:
        taken = {name: of[count] for name, of in times.items() if count in of}
        best = min(taken, key=lambda name: taken[name], default=first)
        chosen.append(best if taken.get(best, inf) < (1 - WORTH) * taken.get(first, inf) else first)
    return tuple(chosen[min(bisect_left(rows, count), len(rows) - 1)] for count in ROWS)


def _prompt(heads: Heads, dtype: torch.dtype) -> str:
    import torch

    if dtype == torch.float32:
        return next(iter(PROMPT_ATTENTION))
    rows = (PROMPT[0],)
    measure = partial(_measure_prompt, heads, dtype)
    return fastest(kept_times(f"prompt {heads}", dtype, tuple(PROMPT_ATTENTION), rows, measure), rows)[0]


def _measure_decode(
    heads: Heads, dtype: torch.dtype, capacity: int, names: Sequence[str], rows: Sequence[int]
) -> Times:
    """Return the milliseconds for each of `rows`, three quarters full and of two lengths, as KV rows are."""
    import torch

    dice = torch.Generator().manual_seed(0)
    pool = [torch.randn((max(rows), heads.key, capacity, heads.dim), generator=dice).to(dtype) for _ in range(2)]
    longest = 3 * capacity // 4
    times: Times = {name: {} for name in names}
    for count in rows:
        mask = torch.zeros((count, 1, 1, longest), dtype=dtype)
        mask[: count // 2, ..., -1] = float("-inf")
        # No row is found in the processor's caches again.
        pairs = [[side[first : first + count, :, :longest] for side in pool] for first in range(0, max(rows), count)]
        ways = {
            name: [
                partial(DECODE_ATTENTION[name], key=key, value=value, mask=mask if count > 1 else None)
                for key, value in pairs
            ]
            for name in names
        }
        query = torch.randn((count, heads.key, heads.query // heads.key, heads.dim), generator=dice).to(dtype)
        for name, ms in race(ways, query, len(pairs)).items():
            times[name][count] = ms
    return times


def _measure_prompt(heads: Heads, dtype: torch.dtype, names: Sequence[str], rows: Sequence[int]) -> Times:
    import torch

    dice = torch.Generator().manual_seed(0)
    queries, keys = PROMPT
    shape = (1, heads.key, queries * heads.query // heads.key, heads.dim)
    query = torch.randn(shape, generator=dice).to(dtype)
    key, value = torch.randn((2, 1, heads.key, keys, heads.dim), generator=dice).to(dtype)
    ways = {name: [partial(PROMPT_ATTENTION[name], key=key, value=value, mask=None)] for name in names}
    return {name: {rows[0]: ms} for name, ms in race(ways, query, 1).items()}
