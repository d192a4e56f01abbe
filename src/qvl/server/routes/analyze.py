"""`POST /v1/analyze`: `analyze()` of the pipeline over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs

from pydantic import BaseModel, ValidationError

from qvl.analysis.product import ProductAnalysis
from qvl.errors import RequestError
from qvl.ids import new_id
from qvl.pipeline.analyze_call import AnalyzeCall
from qvl.pipeline.analyze_document import analyze as analyze_pages
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.server.answers import Analysis
from qvl.server.errors import from_validation
from qvl.server.openai_format import usage_of
from qvl.server.request_body import OF_MEDIA
from qvl.server.routes.locate import overlay_url, task_params
from qvl.server.schemas import AnalyzeRequest
from qvl.server.serving import ServedRequest, cache_policy, read_request
from qvl.types import ChatRequest, JsonMapping, Message

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult
    from qvl.pipeline.parse_request import AnalyzeParams
    from qvl.server.exchange import Exchange

_NO_CHAT = ChatRequest((Message("user"),))


async def analyze(exchange: Exchange) -> None:
    """Answer with brand, category and attributes (or the fields of `schema`) of a product, and confidences.

    The body is JSON, or the picture or PDF itself; then `language` and `model` are query parameters.
    """
    sources: Sequence[UnreadPicture | bytes]
    if exchange.media_type.startswith(OF_MEDIA):
        sources = [await exchange.body()]
        body = _from_query(exchange)
    else:
        body = await read_request(exchange, AnalyzeRequest, lambda body: (body.image or "", *(body.images or ())))
        shown = "image" if body.images is None else "images"
        exchange.field_names = {"messages": shown, "response_format": "schema"}
        sources = [exchange.as_sent(UnreadPicture(source)) for source in _sources(body)]
        several = body.images or ()
        exchange.picture_params = lambda: [f"images[{number}]" for number, _ in enumerate(several)] or ["image"]
    exchange.core.refuse_many_images(sources)
    name = exchange.core.served(body.model)
    # A schema of a thousand parts takes tenths of a second to read, which are nobody else's.
    schema = ProductAnalysis if body.schema_ is None else await asyncio.to_thread(_schema, body.schema_)
    language = body.language or exchange.core.pipeline.language
    analysis = await exchange.until_done(lambda: _analyze(exchange, body, sources, schema, language))
    policy = cache_policy(exchange, deterministic=True)
    headers = ServedRequest(exchange, _NO_CHAT, name, exchange.core.fingerprint(name), policy).headers(analysis.result)
    answer = _answer(analysis, name, language)
    if body.overlay is not None:
        answer["overlay"] = await overlay_url(analysis, body.overlay)
    await exchange.respond_json(answer, headers)


def _from_query(exchange: Exchange) -> AnalyzeRequest:
    query = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1"))
    fields = {name: values[-1] for name, values in query.items()}
    try:
        return AnalyzeRequest.model_validate(fields, strict=False)
    except ValidationError as exc:
        raise from_validation(exc, fields) from exc


def _sources(body: AnalyzeRequest) -> list[str]:
    if (body.image is None) == (body.images is None):
        raise RequestError("give exactly one of image and images", param="image", code="missing_required_parameter")
    return [body.image] if body.image is not None else list(body.images or ())


async def _analyze(
    exchange: Exchange,
    body: AnalyzeRequest,
    sources: Sequence[UnreadPicture | bytes],
    schema: type[BaseModel],
    language: str,
) -> AnalysisResult[object]:
    core = exchange.core
    params = cast("AnalyzeParams", task_params(exchange, body))
    params["temperature"] = body.temperature
    params["evidence"] = body.evidence
    if body.max_tokens is not None:
        params["max_tokens"] = body.max_tokens
    if body.abstain is not None:
        params["abstain"] = body.abstain
    return await analyze_pages(
        core.executor,
        AnalyzeCall(
            sources,
            schema=schema,
            language=language,
            backend=core.executor.backend,
            cache=cache_policy(exchange, deterministic=True),
            params=params,
            namespace=core.namespace(exchange.tenant),
            policy=core.settings.media,
            started=exchange.started,
            calibrator=core.executor.calibrator,
            raw_elsewhere=True,
        ),
    )


def _schema(schema: JsonMapping) -> type[BaseModel]:
    # Only here: most requests bring no schema, and the library that reads them takes its time to load.
    from qvl.analysis.schema_model import model_of

    return model_of(schema)


def _answer(analysis: AnalysisResult[object], name: str, language: str) -> Analysis:
    value, result = analysis.value, analysis.result
    if isinstance(value, ProductAnalysis):
        fields = {"brand": value.brand, "category": value.category, "attributes": value.attributes}
    else:
        assert isinstance(value, BaseModel)
        fields = value.model_dump(mode="json")
    told: Analysis = {
        "id": f"analysis-{new_id()}",
        "object": "analysis",
        "created": int(result.created_at or time.time()),
        "model": name,
        "language": language,
        "analysis": fields,
        **analysis.sureness(),  # type: ignore[typeddict-item]
        "notes": list(result.notes),
        "usage": usage_of(result.usage),
    }
    if analysis.evidence:
        told["evidence"] = {name: None if item is None else item.to_json() for name, item in analysis.evidence.items()}
    if analysis.pages:
        told["pages"] = analysis.pages
    return told
