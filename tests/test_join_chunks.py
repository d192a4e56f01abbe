"""Several pieces of one choice as one: what folds out of them is the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qvl.chunks import fold, join
from qvl.types import Chunk, TokenLogprob, ToolCallDelta

TEXTS = st.text("ab{", max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> list[Chunk]:
    """Text, thoughts and calls in any order, each call with its id and name first."""
    chunks, calls = [], 0
    for _ in range(draw(st.integers(1, 8))):
        deltas = []
        for _ in range(draw(st.integers(0, 2))):
            if calls == 0 or draw(st.booleans()):
                deltas.append(ToolCallDelta(calls, f"call_{calls}", "f", draw(TEXTS)))
                calls += 1
            else:
                deltas.append(ToolCallDelta(calls - 1, arguments=draw(TEXTS)))
        logprobs = tuple(TokenLogprob(text, -0.5) for text in draw(st.lists(TEXTS, max_size=2)))
        chunks.append(Chunk(draw(TEXTS), 2, draw(TEXTS), tuple(deltas), logprobs))
    return chunks


@given(streams())
def test_a_joined_chunk_says_what_its_parts_say(chunks: list[Chunk]) -> None:
    joined = join(chunks)
    assert fold([joined], want_logprobs=True) == fold(chunks, want_logprobs=True)
    if len(chunks) > 1:
        assert [delta.index for delta in joined.tool_calls] == sorted({d.index for c in chunks for d in c.tool_calls})
