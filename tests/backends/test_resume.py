"""An answer that was cut off goes on without a gap and without a word twice."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.backends.resume import Continuation, Diverged
from qvl.chunks import fold
from qvl.types import Chunk, TokenLogprob, ToolCallDelta, Usage

TEXT = "The shoe is red, and its sole is white."


def chunks_of(text: str, cuts: list[int], *, index: int = 0, last: bool = True, call_id: str = "a") -> list[Chunk]:
    """`text` in pieces, each with a log-probability for every character, then a call and the end."""
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    found = [
        Chunk(
            text=piece,
            index=index,
            logprobs=tuple(TokenLogprob(letter, -0.5) for letter in piece),
            token_ids=tuple(map(ord, piece)),
        )
        for piece in pieces
    ]
    found += [
        Chunk(index=index, tool_calls=(ToolCallDelta(0, call_id, "price", '{"of":'),)),
        Chunk(index=index, tool_calls=(ToolCallDelta(0, arguments='"shoe"}'),)),
        Chunk(index=index, finish_reason="stop", usage=Usage(3, 4) if last else None),
    ]
    return found


Cuts = st.lists(st.integers(0, 100), max_size=8)


@given(first=Cuts, second=Cuts, stop=st.integers(0, 30), again=st.integers(0, 30))
def test_whatever_pieces_the_second_answer_comes_in(first: list[int], second: list[int], stop: int, again: int) -> None:
    one = [*chunks_of("yes", [], last=False), *chunks_of(TEXT, first, index=1)]
    two = [*chunks_of("yes", [1], last=False, call_id="b"), *chunks_of(TEXT, second, index=1, call_id="c")]
    whole = fold(one, want_logprobs=True)
    given_on = Continuation()
    out: list[Chunk] = []
    for part in (one[:stop], two[:again], two):
        out += [new for chunk in part if (new := given_on.rest(chunk)) is not None]
        given_on.again()

    choices, usage, _ = fold(out, want_logprobs=True)
    said = [(c.index, c.text, c.logprobs, [(t.name, t.arguments) for t in c.tool_calls]) for c in choices]
    assert said == [(c.index, c.text, c.logprobs, [(t.name, t.arguments) for t in c.tool_calls]) for c in whole[0]]
    assert usage == whole[1]
    assert [chunk.index for chunk in out if chunk.finish_reason] == [0, 1]
    assert all(call.id for choice in choices for call in choice.tool_calls)


def test_another_answer_is_not_joined_to_the_first() -> None:
    given_on = Continuation()
    given_on.rest(Chunk(text="The shoe is red"))
    given_on.again()
    given_on.rest(Chunk(text="The shoe "))
    with pytest.raises(Diverged):
        given_on.rest(Chunk(text="was"))
