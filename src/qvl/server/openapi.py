"""The OpenAPI document: the server's own operations, and the routes that plugins added to the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from qvl.server.route_table import OPERATIONS, Operation
from qvl.types import JsonObject

if TYPE_CHECKING:
    from fastapi import FastAPI

_SCHEMAS: Final = "#/components/schemas/"
_MEANINGS: Final = {
    400: "The request is invalid",
    401: "Missing or invalid API key",
    403: "Refused to pages of other sites",
    404: "No such model, or nothing of this name",
    409: "Not possible any more, or not yet",
    408: "The body was too slow",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "The request is invalid, in the form of this API",
    429: "Too many requests: see Retry-After",
    500: "Internal server error",
    502: "The model's answer was invalid",
    503: "Loading, shutting down, or the engine is dead",
    504: "No answer before the deadline",
    529: "The queue is full: see Retry-After",
}
_STRING: Final = {"type": "string"}
_EVENT: Final[JsonObject] = {
    "type": "object",
    "description": "A server-sent event; `data` is JSON, or [DONE] at the end.",
    "properties": {"event": _STRING, "data": _STRING},
    "required": ["data"],
}


def document(app: FastAPI) -> JsonObject:
    """Return the OpenAPI document, built on the first call."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def _build(app: FastAPI) -> JsonObject:
    page = get_openapi(
        title="qvl",
        version=app.version,
        description="Qwen3-VL behind OpenAI's and Anthropic's APIs, with a cache. Errors have each API's own body.",
        routes=app.routes,
    )
    requests = sorted({op.request for op in OPERATIONS if op.request is not None}, key=lambda kind: kind.__name__)
    errors = {op.errors.answer.__name__: op.errors.answer for op in OPERATIONS}
    answers = [*errors.values(), *(op.answer for op in OPERATIONS if op.answer is not None)]
    _, defined = TypeAdapter.json_schemas(
        [
            *((kind, "validation", TypeAdapter(kind)) for kind in requests),
            *((kind, "serialization", TypeAdapter(kind)) for kind in answers),
        ],
        ref_template=_SCHEMAS + "{model}",
    )
    components = page.setdefault("components", {})
    components.setdefault("schemas", {}).update(defined["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for operation in OPERATIONS:
        if operation.documented:
            page["paths"].setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return page


def _operation(operation: Operation) -> JsonObject:
    if operation.answer is None:
        content: JsonObject = {"text/plain": {"schema": _STRING}}
    else:
        content = {"application/json": {"schema": {"$ref": _SCHEMAS + operation.answer.__name__}}}
    if operation.events:
        # Tools read the schema of a stream as that of one event.
        content["text/event-stream"] = {"schema": _EVENT}
    responses: JsonObject = {"200": {"description": "The answer", "content": content}}
    for status in operation.statuses:
        responses[str(status)] = {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": {"$ref": _SCHEMAS + operation.errors.answer.__name__}}},
        }
    page: JsonObject = {
        "summary": operation.summary,
        "description": operation.handler.__doc__,
        "operationId": operation.handler.__name__,
        "responses": responses,
        "security": [] if operation.open else [{"key": []}, {}],
    }
    if operation.request is not None:
        schema = {"$ref": _SCHEMAS + operation.request.__name__}
        body: JsonObject = {"application/json": {"schema": schema}}
        extra = operation.request.model_config.get("json_schema_extra")
        if isinstance(extra, dict) and isinstance(examples := extra.get("examples"), list):
            body["application/json"]["example"] = examples[0]
        if operation.path == "/v1/analyze":
            for kind in ("image/*", "application/pdf"):
                body[kind] = {"schema": {"type": "string", "format": "binary"}}
        page["requestBody"] = {"required": True, "content": body}
    if operation.path == "/v1/files" and operation.method == "POST":
        form: JsonObject = {"file": _STRING | {"format": "binary"}, "purpose": _STRING | {"enum": ["batch"]}}
        whole = {"type": "object", "properties": form, "required": list(form)}
        page["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": whole}}}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        page["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in names]
    return page
