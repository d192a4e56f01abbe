"""The OpenAPI document: the server's own operations, and the routes that plugins added to the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from qvl.server.route_table import OPERATIONS, Operation

if TYPE_CHECKING:
    from fastapi import FastAPI

_SCHEMAS: Final = "#/components/schemas/"
_MEANINGS: Final = {
    400: "The request cannot be served as it stands",
    401: "No key, or a wrong one",
    404: "No such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Too many requests: see Retry-After",
    500: "A fault of the server",
    502: "The model's answer made no sense",
    503: "Loading, draining, or the engine is dead",
    504: "No answer before the deadline",
}
_STRING: Final = {"type": "string"}
_EVENT: Final[dict[str, Any]] = {
    "type": "object",
    "description": "A server-sent event; `data` is JSON, or [DONE] at the end.",
    "properties": {"event": _STRING, "data": _STRING},
    "required": ["data"],
}
_COUNT: Final = {"type": "integer", "minimum": 0}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


_USAGE: Final = _object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    {"prompt_tokens_details": _object({"cached_tokens": _COUNT, "image_tokens": _COUNT})},
)
_MODEL: Final = _object(
    {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING},
    {"max_model_len": {"type": ["integer", "null"]}, "max_images": _COUNT},
)
_MESSAGE: Final = _object(
    {"role": {"const": "assistant"}, "content": {"type": ["string", "null"]}},
    {"tool_calls": {"type": "array", "items": {"type": "object"}}, "reasoning_content": _STRING},
)
_FINISH: Final = {"enum": ["stop", "length", "tool_calls", "content_filter"]}
ANSWERS: Final[dict[str, dict[str, Any]]] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _STRING,
                    "type": _STRING,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                }
            )
        }
    ),
    "ChatCompletion": _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _STRING,
            "choices": {
                "type": "array",
                "minItems": 1,
                "items": _object(
                    {"index": _COUNT, "message": _MESSAGE, "finish_reason": _FINISH},
                    {"logprobs": {"type": ["object", "null"]}},
                ),
            },
            "usage": _USAGE,
        },
        {"system_fingerprint": _STRING},
    ),
    "Completion": _object(
        {
            "id": _STRING,
            "object": {"const": "text_completion"},
            "created": _COUNT,
            "model": _STRING,
            "choices": {
                "type": "array",
                "items": _object({"index": _COUNT, "text": _STRING, "finish_reason": _FINISH}),
            },
            "usage": _USAGE,
        }
    ),
    "Response": _object(
        {
            "id": _STRING,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["completed", "incomplete", "failed", "in_progress"]},
            "model": _STRING,
            "output": {"type": "array", "items": {"type": "object"}},
            "usage": {"type": ["object", "null"]},
        }
    ),
    "Analysis": _object(
        {
            "id": _STRING,
            "object": {"const": "analysis"},
            "created": _COUNT,
            "model": _STRING,
            "language": _STRING,
            "analysis": {"type": "object"},
            "confidence": {"type": ["number", "null"]},
            "field_confidence": {"type": "object", "additionalProperties": {"type": "number"}},
            "confidence_method": {"type": ["string", "null"]},
            "usage": _USAGE,
        }
    ),
    "Model": _MODEL,
    "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "Health": _object({"status": {"const": "ok"}}),
    "Ready": _object({"status": {"const": "ready"}}),
    "Version": _object(
        {"version": _STRING, "backend": _STRING, "models": {"type": "array", "items": _STRING}, "uptime": _COUNT}
    ),
}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document; built once, when it is first asked for."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def _build(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title="qvl",
        version=app.version,
        description="Qwen3-VL behind OpenAI's API, with a cache. Every error has the body of `Error`.",
        routes=app.routes,
    )
    models = sorted({op.request for op in OPERATIONS if op.request is not None}, key=lambda model: model.__name__)
    _, defined = models_json_schema([(model, "validation") for model in models], ref_template=_SCHEMAS + "{model}")
    components = found.setdefault("components", {})
    components.setdefault("schemas", {}).update({**defined.get("$defs", {}), **ANSWERS})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for operation in OPERATIONS:
        if operation.documented:
            found["paths"].setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return found


def _operation(operation: Operation) -> dict[str, Any]:
    if operation.answers == "text/plain":
        content: dict[str, Any] = {"text/plain": {"schema": _STRING}}
    else:
        content = {"application/json": {"schema": {"$ref": _SCHEMAS + operation.answers}}}
    if operation.events:
        # Tools read the schema of a stream as that of one event.
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    for status in operation.statuses:
        responses[str(status)] = {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": {"$ref": _SCHEMAS + "Error"}}},
        }
    found: dict[str, Any] = {
        "summary": operation.summary,
        "description": operation.handler.__doc__,
        "operationId": operation.handler.__name__,
        "responses": responses,
        "security": [] if operation.open else [{"key": []}, {}],
    }
    if operation.request is not None:
        schema = {"$ref": _SCHEMAS + operation.request.__name__}
        body: dict[str, Any] = {"application/json": {"schema": schema}}
        extra: Any = operation.request.model_config.get("json_schema_extra") or {}
        if extra.get("examples"):
            body["application/json"]["example"] = extra["examples"][0]
        if operation.path == "/v1/analyze":
            body["image/*"] = {"schema": {"type": "string", "format": "binary"}}
        found["requestBody"] = {"required": True, "content": body}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in names]
    return found
