"""Answers that must have a form: the grammar of a request, compiled before it can do harm."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qvl.backends.grammar_schema import call_schema, enforceable
from qvl.backends.openvino.ebnf import SchemaGrammar
from qvl.backends.openvino.library import crossing, import_genai, one_line
from qvl.backends.schema_bounds import check_format
from qvl.errors import RequestError, UnsupportedInputError

if TYPE_CHECKING:
    from qvl.types import ChatRequest


class TextPipeline(Protocol):
    """openvino_genai's LLMPipeline."""

    def generate(self, inputs: str, generation_config: object) -> object: ...


def structure(request: ChatRequest) -> dict[str, str]:
    """Return the arguments of OpenVINO's StructuredOutputConfig for a request; none if the answer is unconstrained.

    Raises:
        RequestError: the schema is not one, or is too large.
        UnsupportedInputError: the schema asserts what the grammar cannot say.
    """
    form = request.response_format
    check_format(form)
    if request.forced_tools:
        return {"grammar": SchemaGrammar(call_schema(request.forced_tools), "tools").text()}
    if form.kind in ("json_schema", "json_object"):
        schema = {"type": "object"} if form.kind == "json_object" else form.schema or {}
        return {"grammar": SchemaGrammar(enforceable(schema, "response_format"), "response_format").text()}
    if form.kind == "regex":
        return {"regex": form.pattern or ""}
    if form.kind == "choice":
        return {"grammar": "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in form.choices)}
    if request.holds_calls:
        strict = any(tool.strict for tool in request.tools)
        raise UnsupportedInputError(
            f"{'strict tools' if strict else 'parallel_tool_calls=false'}: openvino holds calls to a form only"
            " where one is forced",
            hint='tool_choice="required", or leave it out',
            param="tools" if strict else "parallel_tool_calls",
        )
    return {}


class GrammarCheck:
    """Compiles a request's grammar before the request joins the others.

    A grammar that cannot be compiled makes a step of the library fail, after which it can take no other. So each is
    tried on a model of one constant with the same tokenizer first, whose grammars the library keeps for all.

    Args:
        tokenizer: the pipeline's.
        vocab_size: columns of the model's logits.
    """

    def __init__(self, tokenizer: object, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pipeline: TextPipeline | None = None
        self._lock = threading.Lock()

    def config(self, request: ChatRequest) -> object | None:
        """Return OpenVINO's StructuredOutputConfig for a request; None if the answer is unconstrained.

        Raises:
            RequestError: it cannot be compiled.
            UnsupportedInputError: its schema asserts what the grammar cannot say.
        """
        arguments = structure(request)
        if not arguments:
            return None
        _, genai = import_genai()
        config: object = genai.StructuredOutputConfig(**arguments)
        first = genai.GenerationConfig(max_new_tokens=1, apply_chat_template=False, structured_output_config=config)
        with self._lock:
            if self._pipeline is None:
                with crossing():
                    self._pipeline = constant_model(self._tokenizer, self._vocab_size)
            try:
                self._pipeline.generate("a", first)
            except Exception as exc:
                raise RequestError(
                    f"the {'tools' if request.forced_tools else request.response_format.kind} cannot be enforced:"
                    f" {one_line(exc)}",
                    param="tools" if request.forced_tools else "response_format",
                    code="invalid_schema",
                ) from exc
        return config


def constant_model(tokenizer: object, vocab_size: int) -> TextPipeline:
    """Return a pipeline over a model whose logits are all 0."""
    import numpy as np

    openvino, genai = import_genai()
    from openvino import opset15 as op

    tokens = op.parameter([-1, -1], np.int64, name="input_ids")
    mask = op.parameter([-1, -1], np.int64, name="attention_mask")
    beams = op.parameter([-1], np.int32, name="beam_idx")
    for parameter in (tokens, mask, beams):
        parameter.output(0).set_names({parameter.friendly_name})
    shape = op.concat([op.shape_of(tokens), op.constant(np.array([vocab_size], np.int64))], 0)
    logits = op.broadcast(op.constant(np.float32(0)), shape)
    logits.output(0).set_names({"logits"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constant.xml"
        openvino.save_model(openvino.Model([op.result(logits)], [tokens, mask, beams], "constant"), path)
        weights = openvino.Tensor(np.fromfile(path.with_suffix(".bin"), np.uint8))
        pipeline: TextPipeline = genai.LLMPipeline(path.read_text(encoding="utf-8"), weights, tokenizer, "CPU")
    return pipeline
