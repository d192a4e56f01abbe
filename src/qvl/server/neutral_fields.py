"""Request fields that may be ignored at neutral values, since they do not change the answer there.

Clients send every field of their own request classes, most at its default. Sources: the request schemas of OpenAI's
API, of vLLM and of SGLang. At any other value the backend must support the field, or the request is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final, cast

from qvl.sampling import PARAMETERS, Parameter
from qvl.types import PROMPT_FIELDS, JsonMapping, JsonObject

if TYPE_CHECKING:
    from qvl.pipeline.parse_request import RequestParams

_NOTHING: Final[tuple[object, ...]] = ("", [], {})
_OFF: Final[tuple[object, ...]] = (False,)
_ON: Final[tuple[object, ...]] = (True,)
PROMPT_NAMES: Final = frozenset(name for name, _ in PROMPT_FIELDS)
_ONE: Final[tuple[object, ...]] = (1, 1.0)


def _default(known: Parameter) -> tuple[object, ...]:
    """The neutral values of a sampling parameter, at which it has no effect."""
    if known.neutral is not None:
        return known.neutral
    if known.kind in (tuple, Mapping):
        return _NOTHING
    if isinstance(known.default, float):
        return (int(known.default), known.default)
    return tuple(value for value in (known.default, known.off) if value is not None)


NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    **{name: _default(known) for name, known in PARAMETERS.items()},
    # What one route reads and another does not
    "background": _OFF,
    "include": _NOTHING,
    "instructions": _NOTHING,
    "metadata": _NOTHING,
    "modalities": ([], ["text"]),
    "parallel_tool_calls": (True, False),
    "response_format": ({}, {"type": "text"}),
    "structured_outputs": ({},),
    "suffix": _NOTHING,
    "text": (
        {},
        {"verbosity": "medium"},
        {"format": {"type": "text"}},
        {"format": {"type": "text"}, "verbosity": "medium"},
    ),
    "tool_choice": ("none", "auto"),
    "tools": _NOTHING,
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    # OpenAI
    "audio": _NOTHING,
    "function_call": ("none", "auto"),
    "functions": _NOTHING,
    "moderation": _NOTHING,
    "prediction": _NOTHING,
    "prompt": _NOTHING,
    "prompt_cache_options": _NOTHING,
    "prompt_cache_retention": ("in-memory", "in_memory", "24h"),
    "verbosity": ("medium",),
    "conversation": _NOTHING,
    "context_management": (*_NOTHING, {"edits": []}),
    # Anthropic
    "betas": _NOTHING,
    "mcp_servers": _NOTHING,
    "speed": ("standard",),
    # vLLM: sampling
    "best_of": (1,),
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "detokenize": _ON,
    "early_stopping": _OFF,
    "length_penalty": _ONE,
    "logits_processors": _NOTHING,
    "spaces_between_special_tokens": _ON,
    "use_beam_search": _OFF,
    "vllm_xargs": _NOTHING,
    # vLLM: the prompt
    "add_generation_prompt": _ON,
    "add_special_tokens": _OFF,
    "chat_template_content_format": ("auto",),
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": _OFF,
    "documents": _NOTHING,
    "echo": _OFF,
    "media_io_kwargs": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    # vLLM: the answer
    "enable_response_messages": _OFF,
    "kv_transfer_params": _NOTHING,
    "priority": (0,),
    "return_tokens_as_token_ids": _OFF,
    "structural_tag": _NOTHING,
    # SGLang
    "custom_params": _NOTHING,
    "lora_path": _NOTHING,
    "max_new_tokens": _NOTHING,
    "min_new_tokens": (0,),
    "no_stop_trim": _OFF,
    "return_cached_tokens_details": _OFF,
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "separate_reasoning": _ON,
    "stream_reasoning": _ON,
}
_OF_TOOLS: Final[Mapping[str, tuple[object, ...]]] = {
    "allowed_callers": ([], ["direct"]),
    "async": _OFF,
    "defer_loading": _OFF,
    "input_examples": _NOTHING,
}
# Nothing to the engines here, and something to some endpoints: one whose model reasons by itself is told not to, and no
# template of this family knows a verbosity. So they go on to whoever takes fields of others.
NEUTRAL_TO_ENGINES: Final[Mapping[str, tuple[object, ...]]] = {
    "chat_template_kwargs": (
        {"enable_thinking": False},
        {"thinking": False},
        {"enable_thinking": False, "thinking": False},
    ),
    "include_reasoning": (True, False),
    "reasoning": ({}, {"effort": "none"}),
    "reasoning_effort": ("none",),
    "thinking": ({"type": "disabled"},),
    "thinking_token_budget": (0,),
    "verbosity": ("low", "high"),
}


def without_neutral(extra: JsonMapping, *, passed_on: bool) -> JsonObject:
    """Return `extra` without fields at neutral values; `passed_on` is True if the backend accepts unknown fields."""
    return {
        name: value
        for name, value in extra.items()
        if not _is_neutral(name, value, NEUTRAL.get(name, ()))
        and (passed_on or not _is_neutral(name, value, NEUTRAL_TO_ENGINES.get(name, ())))
    }


def without_neutral_params(params: RequestParams, fields: Collection[str]) -> None:
    """Remove parameters of the prompt at neutral values, in place, but those in `fields`, which the backend honours."""
    given = cast("JsonObject", params)
    for name in PROMPT_NAMES & given.keys() - fields:
        if _is_neutral(name, given[name], (*NEUTRAL.get(name, ()), *NEUTRAL_TO_ENGINES.get(name, ()))):
            del given[name]


def without_nulls(value: object) -> object:
    """Return `value` without null fields, recursively."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return value


def without_null_fields(value: object) -> object:
    """Return `value` without null fields at its top level."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if inner is not None}
    return value


def without_switched_off(value: object) -> object:
    """Return `value` without null or false fields at its top level."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if inner is not None and inner is not False}
    return value


def as_called_directly(tool: object) -> object:
    """Return a tool without the fields that say what is so anyway: the model is told of it, calls it, and waits."""
    if not isinstance(tool, Mapping):
        return tool
    return {
        name: value
        for name, value in tool.items()
        if name not in _OF_TOOLS or not _is_neutral(name, value, _OF_TOOLS[name])
    }


def _is_neutral(name: str, value: object, known: tuple[object, ...]) -> bool:
    value = without_switched_off(value) if name == "structured_outputs" else without_nulls(value)
    # By type too: in Python 0 is False and 1 is True.
    return value is None or any(type(value) is type(one) and value == one for one in known)
