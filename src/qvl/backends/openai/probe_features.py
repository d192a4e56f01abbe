"""The features that are asked of an endpoint: the request fields of each, and the check that an answer honours them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qvl.backends.openai.wire import format_fields
from qvl.sampling import PARAMETERS
from qvl.types import Choice, PromptFacts, ResponseFormat, Usage

CANARY: Final = "zq7-Kestrel-41"
WORDS: Final = "Answer with the single digit 1."


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a probe request."""

    choices: tuple[Choice, ...]
    usage: Usage
    prompt: PromptFacts | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text.strip() if self.choices else ""


@dataclass(frozen=True, slots=True)
class Feature:
    """The probe of a feature: request fields, and the check that the answer honours it."""

    name: str
    fields: Mapping[str, object]
    obeyed: Callable[[Answered, Answered], bool]
    max_tokens: int = 8
    question: str = WORDS


def _is_canary(text: str) -> bool:
    try:
        return bool(json.loads(text) == {"canary": CANARY})
    except ValueError:
        return False


def _object_of(name: str, schema: Mapping[str, object]) -> dict[str, object]:
    """Return the schema of an object with one field."""
    return {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}


_TOOL: Final = {
    "name": "canary",
    "description": "Reports that everything is well.",
    "parameters": _object_of("ok", {"type": "boolean"}),
}
FORMATS: Final = (
    Feature(
        "json_schema",
        format_fields(ResponseFormat("json_schema", schema=_object_of("canary", {"enum": [CANARY]}), name="canary")),
        lambda answer, base: _is_canary(answer.text),
        max_tokens=64,
    ),
    Feature(
        "json_object",
        format_fields(ResponseFormat("json_object")),
        lambda answer, base: answer.text.startswith("{"),
        max_tokens=16,
        question="Answer in JSON with the single digit 1.",
    ),
    Feature(
        "regex",
        format_fields(ResponseFormat("regex", pattern="zq7-Kes[t]rel-41")),
        lambda answer, base: answer.text == CANARY,
        max_tokens=32,
    ),
    Feature(
        "grammar",
        format_fields(ResponseFormat("grammar", pattern=f'root ::= "{CANARY}"')),
        lambda answer, base: answer.text == CANARY,
        max_tokens=32,
    ),
    Feature(
        "choice",
        format_fields(ResponseFormat("choice", choices=(CANARY, f"{CANARY}9"))),
        lambda answer, base: bool(re.fullmatch(f"{CANARY}9?", answer.text)),
        max_tokens=32,
    ),
)
# OpenAI demands an object on top of a schema; others take a list as well.
_CANARIES: Final = {"type": "array", "items": {"enum": [CANARY]}, "minItems": 1, "maxItems": 1}
LISTS: Final = Feature(
    "lists",
    format_fields(ResponseFormat("json_schema", schema=_CANARIES, name="canaries")),
    lambda answer, base: answer.text.startswith("["),
    max_tokens=64,
)
# Room for a model that spells every letter.
TOOLS: Final = Feature(
    "tools",
    {
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "canary"}},
    },
    lambda answer, base: any(choice.tool_calls for choice in answer.choices),
    max_tokens=160,
    question="Call the function canary with ok set to true.",
)
SAMPLING: Final = (
    Feature("n", {"n": 2}, lambda answer, base: len(answer.choices) == 2, max_tokens=2),
    Feature(
        "logprobs",
        {"logprobs": True, "top_logprobs": 2},
        lambda answer, base: any(choice.logprobs for choice in answer.choices),
        max_tokens=2,
    ),
    # At temperature 2 an answer equal to the greedy one is next to impossible, unless one token is left to choose from.
    Feature("top_k", {"top_k": 1, "temperature": 2.0}, lambda answer, base: answer.text == base.text),
    Feature("min_p", {"min_p": 1.0, "temperature": 2.0}, lambda answer, base: answer.text == base.text),
    Feature("bad_words", {"bad_words": ["1"]}, lambda answer, base: "1" not in answer.text),
    # Whatever these tokens are, an answer of nothing else is another one.
    Feature("allowed_token_ids", {"allowed_token_ids": [70, 71]}, lambda answer, base: answer.text != base.text),
    Feature("logit_bias", {"logit_bias": {"70": 100}}, lambda answer, base: answer.text != base.text),
    # One of these comes in any answer, and without the field none would be left of it.
    Feature(
        "include_stop_str_in_output",
        {"include_stop_str_in_output": True, "stop": ["1", "e", "a", "i", "n", "o", "t", ".", "。"]},
        lambda answer, base: any(mark in answer.text for mark in "1eainot.。"),
    ),
    Feature(
        "prompt_logprobs",
        {"prompt_logprobs": 1},
        lambda answer, base: answer.prompt is not None and bool(answer.prompt.logprobs),
        max_tokens=2,
    ),
    Feature(
        "logprob_token_ids",
        {"logprobs": True, "logprob_token_ids": [70, 71]},
        lambda answer, base: any(choice.logprobs and len(choice.logprobs[0].top) >= 2 for choice in answer.choices),
        max_tokens=2,
    ),
    Feature(
        "return_token_ids",
        {"return_token_ids": True},
        lambda answer, base: any(choice.token_ids for choice in answer.choices),
        max_tokens=2,
    ),
    Feature(
        "truncate_prompt_tokens",
        {"truncate_prompt_tokens": 4},
        lambda answer, base: 0 < answer.usage.prompt_tokens <= 4 < base.usage.prompt_tokens,
        max_tokens=2,
    ),
    Feature(
        "min_tokens",
        {"min_tokens": 24},
        lambda answer, base: all(choice.finish_reason == "length" for choice in answer.choices),
        max_tokens=24,
    ),
    Feature(
        "ignore_eos",
        {"ignore_eos": True},
        lambda answer, base: all(choice.finish_reason == "length" for choice in answer.choices),
        max_tokens=24,
    ),
)
# Whether the others were obeyed cannot be seen in a few tokens: accepted counts as honoured.
ACCEPTED: Final[Mapping[str, Mapping[str, object]]] = {
    name: {name: known.on_the_wire}
    for name, known in PARAMETERS.items()
    if known.sent != "always" and name not in {"max_tokens", *(feature.name for feature in SAMPLING)}
}
