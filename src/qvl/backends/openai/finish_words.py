"""Maps the finish reasons of all servers to their meanings."""

from __future__ import annotations

import re
from typing import Final

_LENGTH: Final = (
    "length incomplete max_tokens max_length max_new_tokens max_output_tokens max_completion_tokens model_length "
    "token_limit context_length context_length_exceeded model_context_window_exceeded num_predict"
)
_TOOL_CALLS: Final = "tool_calls tool_call tool_use function_call function_calls"
_FAILED: Final = (
    "error failed failure abort aborted cancel cancelled canceled timeout network_error internal_error "
    "insufficient_system_resource malformed_function_call malformed_response recitation repetition_truncation"
)
_WITHHELD: Final = (
    "sensitive prohibited_content spii image_prohibited_content guardrail guardrail_intervened guardrails"
)
_MEANS: Final[dict[str, str]] = {
    word: meaning
    for meaning, words in (
        ("length", _LENGTH),
        ("tool_calls", _TOOL_CALLS),
        ("failed", _FAILED),
        ("withheld", _WITHHELD),
        ("refused", "refusal refused"),
    )
    for word in words.split()
}
# Tried in this order. A word that has none of these ends an answer as it should: stop, eos, end, end_turn, complete, …
_STEMS: Final = (
    ("withheld", re.compile("filter|policy|moderat|block(?!_)|safe|sensitiv|flag|censor|prohibit|violat")),
    ("failed", re.compile("error|fail|abort|cancel|time_?out|timed|preempt|interrupt|repetit")),
    ("length", re.compile("length|limit|trunc|max")),
    # The token that ends an answer: eos_token, stop_token, end_of_text_token.
    ("stop", re.compile("stop|eo[st]|end")),
    ("length", re.compile("token")),
)
_HUMP: Final = re.compile("(?<=[a-z])(?=[A-Z])")


def meaning_of(reason: object) -> str | None:
    """Return length, tool_calls, failed, withheld, refused or stop; None if the answer is not finished."""
    if reason is None or reason == "stop":
        # As nearly all of them are.
        return None if reason is None else "stop"
    # Gemini's are written in capitals, others with hyphens, with spaces or as maxTokens; FINISH_REASON_ is an enum's.
    word = re.sub(r"[\s-]+", "_", _HUMP.sub("_", str(reason or "").strip())).lower().rpartition("finish_reason_")[2]
    if word in ("", "null", "none", "unspecified"):
        return None
    return _MEANS.get(word) or next((meaning for meaning, stems in _STEMS if stems.search(word)), "stop")
