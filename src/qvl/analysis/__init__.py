"""The prompt, the default schema, reading an answer as a schema, and how sure it is. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import (
        CONFIDENCE_METHOD,
        AnalysisResult,
        ProductAnalysis,
        ProductFields,
        SchemaLike,
        V,
        boxed,
        build_messages,
        check_language,
        confidences,
        find,
        generation_schema,
        own_fields,
        parse,
        prompt_version,
        response_format,
        retry_messages,
        schema_name,
        validate,
        value_spans,
    )

_HOME = {
    "AnalysisResult": "parse_answer",
    "CONFIDENCE_METHOD": "parse_answer",
    "ProductAnalysis": "parse_answer",
    "ProductFields": "parse_answer",
    "SchemaLike": "parse_answer",
    "V": "parse_answer",
    "boxed": "parse_answer",
    "build_messages": "parse_answer",
    "check_language": "parse_answer",
    "confidences": "parse_answer",
    "find": "parse_answer",
    "generation_schema": "parse_answer",
    "own_fields": "parse_answer",
    "parse": "parse_answer",
    "prompt_version": "parse_answer",
    "response_format": "parse_answer",
    "retry_messages": "parse_answer",
    "schema_name": "parse_answer",
    "validate": "parse_answer",
    "value_spans": "parse_answer",
}

__all__ = [
    "CONFIDENCE_METHOD",
    "AnalysisResult",
    "ProductAnalysis",
    "ProductFields",
    "SchemaLike",
    "V",
    "boxed",
    "build_messages",
    "check_language",
    "confidences",
    "find",
    "generation_schema",
    "own_fields",
    "parse",
    "prompt_version",
    "response_format",
    "retry_messages",
    "schema_name",
    "validate",
    "value_spans",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
