"""`analyze()` over a document: all pages in one request within the budget, else page by page, and merged."""

from __future__ import annotations

import json
import math
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qvl import analysis
from qvl.analysis.parse_answer import own_fields
from qvl.analysis.product import AnalysisResult
from qvl.evidence.shapes import Located
from qvl.media import gate
from qvl.media.document import Document
from qvl.media.document_head import looks_like_document
from qvl.media.page_choice import apart
from qvl.media.video import paged
from qvl.pipeline.load_pictures import load_pictures
from qvl.pipeline.map_in_order import map_in_order
from qvl.pipeline.merge_pages import MergedAnswer, PageAnswer, merge_pages
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import JsonObject, Result, Timing, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.media.picture import Picture
    from qvl.pipeline.analyze_call import AnalyzeCall
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.parse_parts import PictureLike

# Pages of one document under way at a time.
AT_ONCE: Final = 4


def may_be_long(call: AnalyzeCall) -> bool:
    """Return True if a document may be among the pictures of `call`; a URL is known only when it is fetched."""
    return any(_may_be_document(picture) for picture in call.pictures)


def _may_be_document(picture: UnreadPicture) -> bool:
    source = picture.source
    if isinstance(source, Document) or picture.document:
        return True
    return gate.is_remote(source) or looks_like_document(apart(source)[0])  # type: ignore[arg-type]


async def analyze(executor: Executor, call: AnalyzeCall) -> AnalysisResult[object]:
    """Return the analysis of `call`, where its documents have too many pages for one request by several of them.

    Raises:
        AnalysisError: what the pages tell together does not fit the schema.
    """
    if not may_be_long(call):
        return await executor.execute(call)
    policy = call.policy or executor.media
    if call.loaded is None:
        call.loaded = await load_pictures(call.pictures, policy, digests=executor.digests)
    documents = [medium for medium in call.loaded if isinstance(medium, Document)]
    pages = [page for document in documents for page in document.pages]
    if len(pages) < 2 or await _is_one(executor, call, documents, policy.max_document_pixels):
        return await executor.execute(call)
    call.refuse_long(documents[0].source)
    began = time.perf_counter()
    schema = page_schema(analysis.generation_schema(call.schema))
    beside: list[PictureLike] = [UnreadPicture(one) for one in call.loaded if not isinstance(one, Document)]

    async def one(page: Picture) -> tuple[AnalysisResult[object], Result | None]:
        found = await executor.execute(call.of([page, *beside], schema))
        return found, found.result

    found: list[AnalysisResult[object]] = []
    async with aclosing(map_in_order(pages, one, AT_ONCE, False)) as items:
        async for item in items:
            if item.error is not None:
                raise item.error
            assert item.value is not None
            found.append(item.value)
    numbers = [number for document in documents for number in document.numbers]
    return _together(call, numbers, pages, found, time.perf_counter() - began)


async def _is_one(executor: Executor, call: AnalyzeCall, documents: Sequence[Document], budget: int) -> bool:
    """Return True if one request takes all pictures of `call`: within the budget, and within what the backend takes."""
    backend = executor.backend
    have = backend.peek_capabilities()
    if have is None:
        await executor.open()
        have = backend.capabilities
    return sum(document.num_pixels for document in documents) <= budget and len(paged(call.loaded or ())) <= have.images


def page_schema(schema: JsonObject) -> JsonObject:
    """Return the schema of a single page's answer: each field is there, or null where the page does not tell it."""
    null = {"type": "null"}
    properties = {name: {"anyOf": [node, null]} for name, node in (schema.get("properties") or {}).items()}
    return {**schema, "properties": properties, "required": list(properties)} if properties else schema


def _together(
    call: AnalyzeCall,
    numbers: Sequence[int],
    pages: Sequence[Picture],
    found: Sequence[AnalysisResult[object]],
    seconds: float,
) -> AnalysisResult[object]:
    answers = [
        PageAnswer(number, own_fields(one.value), one.field_confidence)
        for number, one in zip(numbers, found, strict=True)
    ]
    merged = merge_pages(answers)
    first = found[0].result
    results = [one.result for one in found]
    notes = [f"asked page by page: {len(pages)} pages are more than one request takes", *merged.notes]
    notes += dict.fromkeys(note for result in results for note in result.notes)
    text = json.dumps(merged.data, ensure_ascii=False)
    result = replace(
        first,
        choices=(replace(first.choices[0], text=text, logprobs=None),),
        usage=Usage.sum(result.usage for result in results),
        timing=Timing(total=seconds),
        cache=first.cache if len({result.cache for result in results}) == 1 else "miss",
        notes=tuple(notes),
        pictures=tuple(picture for result in results for picture in result.pictures),
        key=None,
    )
    every = [one.confidence for one in found]
    told = [sure for sure in every if sure is not None]
    whole = AnalysisResult(
        value=None,
        result=result,
        confidence=math.prod(told) if len(told) == len(every) else None,
        field_confidence=merged.sure,
        confidence_method=found[0].confidence_method,
        evidence=_evidence(merged, numbers, found),
        pages=merged.pages,
    )
    return call.joined(merged.data, whole)


def _evidence(
    merged: MergedAnswer, numbers: Sequence[int], found: Sequence[AnalysisResult[object]]
) -> dict[str, Located | None]:
    """Return the evidence of each field on the page that it was taken from, or on the first that shows it."""
    evidence: dict[str, Located | None] = {}
    # Pictures beside the pages stand behind each of them.
    each = len(found[0].result.pictures)
    for name in dict.fromkeys(name for one in found for name in one.evidence):
        taken = merged.pages.get(name)
        ranked = sorted(range(len(found)), key=lambda at: numbers[at] != taken)
        at = next((at for at in ranked if found[at].evidence.get(name) is not None), None)
        item = None if at is None else found[at].evidence[name]
        if item is not None and item.box is not None and at is not None:
            item = replace(item, box=replace(item.box, picture=at * each + item.box.picture))
        evidence[name] = item
    return evidence
