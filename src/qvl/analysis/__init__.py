"""The prompts and schemas of an analysis, the parsing of its answers, and the confidence of each value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.analysis.confidence import CONFIDENCE_METHOD, confidences, value_spans
    from qvl.analysis.parse_answer import (
        boxed,
        build_messages,
        check_language,
        find,
        generation_schema,
        parse,
        prompt_version,
        response_format,
        retry_messages,
        validate,
    )
    from qvl.analysis.product import AnalysisResult, ProductAnalysis, ProductFields

__all__ = [
    "CONFIDENCE_METHOD",
    "AnalysisResult",
    "ProductAnalysis",
    "ProductFields",
    "boxed",
    "build_messages",
    "check_language",
    "confidences",
    "find",
    "generation_schema",
    "parse",
    "prompt_version",
    "response_format",
    "retry_messages",
    "validate",
    "value_spans",
]
_PARSE_ANSWER = (
    "boxed build_messages check_language find generation_schema parse prompt_version response_format retry_messages "
    "validate"
)
__getattr__ = lazy(
    __name__,
    {
        ".confidence": ("CONFIDENCE_METHOD", "confidences", "value_spans"),
        ".parse_answer": _PARSE_ANSWER.split(),
        ".product": ("AnalysisResult", "ProductAnalysis", "ProductFields"),
    },
)
