"""LangChain's structured output: the response format or tool for a schema, and the parsing of the answer."""

from __future__ import annotations

import json

from langchain_core.messages import AIMessage
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from qvl.analysis.confidence import CONFIDENCE_METHOD, confidences
from qvl.analysis.find_json import find_values
from qvl.errors import AnalysisError
from qvl.types import Choice, JsonObject


class Structured:
    """A schema as a `response_format`, or as the one `tool` that the model has to call.

    Args:
        schema: a pydantic class of either version, a TypedDict, or a JSON schema.
        method: json_schema, json_mode or function_calling, as in LangChain.
    """

    def __init__(self, schema: JsonObject | type, method: str) -> None:
        self.method = method
        self.tool: JsonObject | None = None
        self.response_format: JsonObject | None = None
        self._model = schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
        # A class of pydantic's first version, which LangChain still allows.
        self._older = getattr(schema, "parse_obj", None)
        self._required: list[str] = []
        if method == "function_calling":
            self.tool = convert_to_openai_tool(schema)
            function = self.tool["function"]
            function["parameters"] = self._enforced(function.get("parameters") or {"type": "object"})
        elif method == "json_mode":
            self.response_format = {"type": "json_object"}
        else:
            full = self._model.model_json_schema() if self._model is not None else convert_to_json_schema(schema)
            named = {"name": full.get("title", "answer"), "schema": self._enforced(full)}
            self.response_format = {"type": "json_schema", "json_schema": named}

    def _enforced(self, schema: JsonObject) -> JsonObject:
        from qvl.backends.grammar_schema import without_what_is_checked_afterwards

        self._required = schema.get("required", [])
        # A class checks these once the answer is there; no grammar could, and some refuse the whole schema for them.
        validated = self._model is not None or self._older is not None
        return without_what_is_checked_afterwards(schema) if validated else schema

    def read(self, message: AIMessage) -> JsonObject | BaseModel:
        """Return the answer as an instance of the schema class, or as a dictionary if the schema is not a class.

        Raises:
            AnalysisError: the answer does not fit the schema, or was cut off.
        """
        from qvl.analysis.find_json import find_object
        from qvl.analysis.parse_answer import parse

        complete = message.response_metadata.get("finish_reason") != "length"
        if self.tool is not None and not complete:
            # LangChain completes the arguments of what was streamed, also where they were cut off.
            raise AnalysisError("the answer was cut off", raw=message.text, hint="raise max_tokens")
        text = message.text if self.tool is None else _called(message, self.tool["function"]["name"])
        if self._model is not None:
            return parse(text, self._model, complete=complete)
        value = find_object(
            text, complete=complete, fits=lambda value: all(name in value for name in self._required)
        ).value
        return value if self._older is None else self._older(value)


def sureness(choice: Choice) -> JsonObject:
    """Return how likely the model was to write the values of a JSON answer; nothing of others, or without logprobs."""
    match = next((match for match in find_values(choice.text) if match.exact), None) if choice.logprobs else None
    if match is None:
        return {}
    whole, fields = confidences(choice.text, choice.logprobs, match.start)
    if whole is None:
        return {}
    return {"confidence": whole, "field_confidence": fields, "confidence_method": CONFIDENCE_METHOD}


def _called(message: AIMessage, name: str) -> str:
    """Return the arguments of the first call of the tool `name`; without a call, the text."""
    for call in message.tool_calls:
        if call["name"] == name:
            return json.dumps(call["args"])
    for bad in message.invalid_tool_calls:
        if bad["name"] == name:
            return bad["args"] or ""
    return message.text
