"""`POST /v1/analyze`: the pipeline's own verb."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from pydantic import BaseModel, ValidationError

from qvl.analysis.product import ProductAnalysis
from qvl.errors import MediaError, RequestError
from qvl.ids import new_id
from qvl.pipeline.analyze_call import AnalyzeCall
from qvl.server.cache_headers import policy_of
from qvl.server.errors import from_validation
from qvl.server.openai_format import usage_of
from qvl.server.schemas import AnalyzeRequest
from qvl.server.serving import ServedRequest
from qvl.types import ChatRequest, Message

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult
    from qvl.pipeline.parse_request import AnalyzeParams
    from qvl.server.exchange import Exchange


async def analyze(exchange: Exchange) -> None:
    """Brand, category and attributes (or a schema of one's own) of a product, with confidences.

    The body is JSON, or the picture itself with its media type; then `language` and `model` stand in the query.
    """
    body = await exchange.body()
    if exchange.media_type.startswith(b"image/"):
        wanted, sources = _from_query(exchange), [body]
    else:
        try:
            wanted = AnalyzeRequest.model_validate_json(body)
        except ValidationError as exc:
            raise from_validation(exc, body) from exc
        sources = _sources(wanted)
        several = wanted.images or ()
        exchange.picture_places = lambda: [f"images[{number}]" for number, _ in enumerate(several)] or ["image"]
    name = exchange.core.served(wanted.model)
    # A schema of a thousand parts takes tenths of a second to read, which are nobody else's.
    schema = ProductAnalysis if wanted.schema_ is None else await asyncio.to_thread(_schema, wanted.schema_)
    found = await exchange.until_done(lambda: _analyze(exchange, wanted, sources, schema))
    policy = _policy(exchange)
    asked = ServedRequest(exchange, _NOTHING, name, exchange.core.fingerprint, policy)
    headers = asked.headers(found.result)
    await exchange.respond_json(_answer(found, name, wanted, exchange), headers)


_NOTHING = ChatRequest((Message("user"),))


def _from_query(exchange: Exchange) -> AnalyzeRequest:
    query = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1"))
    given: dict[str, Any] = {name: values[-1] for name, values in query.items()}
    try:
        return AnalyzeRequest.model_validate(given, strict=False)
    except ValidationError as exc:
        raise from_validation(exc, given) from exc


def _sources(wanted: AnalyzeRequest) -> list[Any]:
    if (wanted.image is None) == (wanted.images is None):
        raise RequestError("give either image or images", param="image", code="missing_required_parameter")
    return [wanted.image] if wanted.image is not None else list(wanted.images or ())


def _policy(exchange: Exchange) -> Any:
    executor = exchange.core.executor
    policy = policy_of(exchange.headers.get(b"cache-control"), executor.cache_mode, deterministic=True)
    return policy if executor.store is not None else type(policy)(read=False, write=False)


async def _analyze(
    exchange: Exchange, wanted: AnalyzeRequest, sources: list[Any], schema: type[BaseModel]
) -> AnalysisResult[Any]:
    core = exchange.core
    params: AnalyzeParams = {
        "request_id": exchange.request_id,
        "max_pixels": wanted.max_pixels,
        "min_pixels": wanted.min_pixels,
        "seed": wanted.seed,
        "temperature": wanted.temperature,
    }
    if wanted.max_tokens is not None:
        params["max_tokens"] = wanted.max_tokens
    try:
        return await core.executor.execute(
            AnalyzeCall(
                sources,
                schema=schema,
                language=wanted.language or core.pipeline.language,
                cache=_policy(exchange),
                params=params,
                namespace=core.namespace(exchange.tenant),
                policy=core.settings.media,
                started=exchange.started,
            )
        )
    except MediaError as exc:
        core.metrics.media_errors.labels(exc.code).inc()
        raise


def _schema(given: Mapping[str, Any]) -> type[BaseModel]:
    # Only here: most requests bring no schema, and the library that reads them takes its time to load.
    from qvl.analysis.schema_model import model_of

    return model_of(given)


def _answer(found: AnalysisResult[Any], name: str, wanted: AnalyzeRequest, exchange: Exchange) -> dict[str, Any]:
    value: BaseModel = found.value
    if isinstance(value, ProductAnalysis):
        told: dict[str, Any] = {"brand": value.brand, "category": value.category, "attributes": value.attributes}
    else:
        told = value.model_dump(mode="json")
    result = found.result
    return {
        "id": f"analysis-{new_id()}",
        "object": "analysis",
        "created": int(result.created_at or time.time()),
        "model": name,
        "language": wanted.language or exchange.core.pipeline.language,
        "analysis": told,
        "confidence": found.confidence,
        "field_confidence": found.field_confidence,
        "confidence_method": found.confidence_method,
        "notes": list(result.notes),
        "usage": usage_of(result.usage),
    }
