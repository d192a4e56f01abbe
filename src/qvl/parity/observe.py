"""Asks one side about one case, and notes every layer that its backend shows."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qvl.analysis.parse_answer import own_fields
from qvl.analysis.product import ProductAnalysis, ProductFields
from qvl.errors import AnalysisError, ConfigError, QvlError
from qvl.evaluation.compare import label_parts
from qvl.http.trace_context import CARRIED
from qvl.parity.observation import Observation, TokenStep
from qvl.pipeline.parse_request import draft_request, question_messages

if TYPE_CHECKING:
    from qvl.media.picture import Picture
    from qvl.parity.case import Case
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.parse_request import RequestParams
    from qvl.types import JsonMapping, JsonObject, Result, TokenLogprob

TOP: Final = 20
# Of the steps behind the first: enough to name the margin between two candidates.
TOP_LATER: Final = 5
MAX_TOKENS: Final = 256
_PAD: Final = "<|image_pad|>"
_PADS: Final = re.compile(rf"(?:{re.escape(_PAD)}){{2,}}")
_REPLACED: Final = "\ufffd"
# Of decisions, which do not sample.
_OF_DECISIONS: Final = ("max_pixels", "min_pixels", "extra", "cache_salt", "chat_template_kwargs")


async def observe(pipeline: AsyncPipeline, case: Case, request: JsonMapping, *, salt: str = "") -> Observation:
    """Return what `pipeline` shows of `case`, asked anew; `request` are parameters as of `ask`.

    An answer that fails is an observation with an error; `salt` keeps computed prefixes apart, where the backend can.
    An endpoint is told not to answer from what it keeps: that shows nothing of how it answers now.

    Raises:
        ConfigError: what would fail for every case.
    """
    await pipeline.open()
    params: JsonObject = {"temperature": 0.0, "cache": "off", **request}
    if salt:
        params["cache_salt"] = salt
    carried = CARRIED.set({**CARRIED.get(), "Cache-Control": "no-store"})
    try:
        if case.kind == "decisions":
            return await _decisions(pipeline, case, params)
        return await _answer(pipeline, case, params)
    except ConfigError:
        raise
    except QvlError as exc:
        return Observation(case.id, error=str(exc), retryable=exc.retryable)
    finally:
        CARRIED.reset(carried)


async def _answer(pipeline: AsyncPipeline, case: Case, params: JsonObject) -> Observation:
    have = pipeline.backend.capabilities
    if have.logprobs:
        params.setdefault("logprobs", min(TOP, have.top_logprobs))
    if "return_token_ids" in have.sampling:
        params["return_token_ids"] = True
    fields: JsonObject | None = None
    sure: Mapping[str, float] = {}
    try:
        if case.question is not None:
            params.setdefault("max_tokens", MAX_TOKENS)
            result = await pipeline.ask(list(case.pictures), case.question, **_typed(params))
        else:
            schema = ProductAnalysis if case.schema is None else case.schema
            # An analysis takes none: its prefix is everybody's of this process.
            params.pop("cache_salt", None)
            answer = await pipeline.analyze_result(list(case.pictures), schema=schema, **params)
            result, fields, sure = answer.result, _fields(answer.value), answer.raw_field_confidence
    except AnalysisError as exc:
        return Observation(case.id, error=f"{exc.message}: {exc.raw[:200]!r}", text=exc.raw)
    ids: Sequence[int] | None = result.prompt.token_ids if result.prompt is not None else None
    template = result.prompt.text if result.prompt is not None else ""
    if ids is None and case.question is not None:
        ids = await _tokenized(pipeline, case.question, result.pictures, params)
    if ids and not template:
        # Endpoints tell ids alone.
        with contextlib.suppress(QvlError):
            template = await pipeline.backend.detokenize(ids)
    sizes, hashes = await asyncio.to_thread(_pixels, result.pictures)
    return Observation(
        case=case.id,
        sizes=sizes,
        pixels=hashes,
        picture_tokens=_picture_tokens(ids, len(sizes), result),
        prompt_tokens=result.usage.prompt_tokens,
        prompt_ids=tuple(ids) if ids else None,
        template=_PADS.sub(_PAD, template) or None,
        steps=_steps(result.logprobs or ()),
        text=result.text,
        finish_reason=result.finish_reason,
        fields=fields,
        sure=sure,
        completion_tokens=result.usage.completion_tokens,
        seconds=result.timing.total,
        first_token=result.timing.first_token,
    )


async def _decisions(pipeline: AsyncPipeline, case: Case, params: JsonObject) -> Observation:
    limits = {name: params[name] for name in _OF_DECISIONS if name in params}
    began = time.perf_counter()
    found = await pipeline.decide(list(case.pictures), case.questions, cache="off", **limits)
    seconds = time.perf_counter() - began
    sizes, hashes = await asyncio.to_thread(_pixels, found.pictures)
    names = [answer.name or answer.asked for answer in found]
    return Observation(
        case=case.id,
        sizes=sizes,
        pixels=hashes,
        # Not its prompt tokens: those are of all requests that it took, of which there are more where more is probable.
        decisions={
            name: {str(value): share for value, share in answer.probabilities.items()}
            for name, answer in zip(names, found, strict=True)
            if answer.probabilities is not None
        },
        choices={name: answer.value for name, answer in zip(names, found, strict=True)},
        completion_tokens=found.usage.completion_tokens,
        seconds=seconds,
    )


def _typed(params: JsonObject) -> RequestParams:
    return params  # type: ignore[return-value]


async def _tokenized(
    pipeline: AsyncPipeline, question: str, pictures: Sequence[Picture], params: JsonObject
) -> Sequence[int] | None:
    """Return the prompt's ids as `/tokenize` tells them; None where it does not."""
    extra = {name: params[name] for name in ("chat_template_kwargs", "max_pixels", "min_pixels") if name in params}
    try:
        draft = draft_request(question_messages(list(pictures), question, None), **extra)
        return (await pipeline.backend.tokenize(draft.finished(pictures))).ids
    except QvlError:
        return None


def _pixels(pictures: Sequence[Picture]) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    hashes = tuple(pixel_hash(picture) for picture in pictures)
    return tuple((picture.width, picture.height) for picture in pictures), hashes


def pixel_hash(picture: Picture) -> str:
    """Return the sha256 of a picture's canonical pixels, as RGB."""
    return hashlib.sha256(picture.rgb().tobytes()).hexdigest()


def _picture_tokens(ids: Sequence[int] | None, pictures: int, result: Result) -> tuple[int, ...] | None:
    """Return how many tokens each picture takes: runs of one id, of which there must be one for each picture."""
    if not pictures:
        return ()
    if ids:
        runs = [(token, len(list(run))) for token, run in itertools.groupby(ids)]
        longest = Counter[int]()
        for token, length in runs:
            longest[token] += length if length > 1 else 0
        ((pad, _),) = longest.most_common(1)
        found = tuple(length for token, length in runs if token == pad)
        if len(found) == pictures:
            return found
    if result.usage.image_tokens and pictures == 1:
        return (result.usage.image_tokens,)
    return None


def _steps(tokens: Sequence[TokenLogprob]) -> tuple[TokenStep, ...]:
    return tuple(
        TokenStep(
            _name(token),
            token.logprob,
            {_name(other): other.logprob for other in token.top[: TOP_LATER if place else TOP]},
        )
        for place, token in enumerate(tokens)
    )


def _name(token: TokenLogprob) -> str:
    """Return the token's text; its bytes, where it is only a part of a letter."""
    return token.token if _REPLACED not in token.token or not token.bytes else f"0x{token.bytes.hex()}"


def _fields(value: object) -> JsonObject:
    told = own_fields(value)
    if isinstance(value, ProductAnalysis):
        told = {name: told[name] for name in ProductFields.model_fields}
    return dict(label_parts(told, {}))
