"""The flow of `analyze()`: ask with the schema, read the answer, ask once more if it is no such thing, remember."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

from qvl import analysis
from qvl.analysis import AnalysisResult, ProductAnalysis
from qvl.errors import AnalysisError, ConfigError
from qvl.flight import Outcome, Written
from qvl.messages import load_pictures, sampling_params
from qvl.types import ChatRequest, ResponseFormat, Result, Usage

if TYPE_CHECKING:
    from qvl.pipeline import AsyncPipeline, Job
    from qvl.store import CacheMode, CachePolicy

MAX_TOKENS: Final = 512


class Analyzer:
    """One schema in one language over one pipeline."""

    def __init__(self, pipeline: AsyncPipeline, schema: type[Any], language: str) -> None:
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise ConfigError(f"schema must be a pydantic model class, not {schema!r}", param="schema")
        self.pipeline = pipeline
        box = analysis.boxed(schema)
        self.schema: type[BaseModel] = box or schema
        self._boxed = box is not None
        self.language = analysis.check_language(language)

    async def run(
        self,
        sources: Sequence[Any],
        cache: CacheMode | CachePolicy,
        started: float,
        params: Mapping[str, Any],
        *,
        namespace: str | None = None,
        policy: Any = None,
    ) -> AnalysisResult[Any]:
        """Analyzes one product, shown on the pictures `sources`.

        Raises:
            AnalysisError: no valid answer, also when asked again once.
        """
        request = await self.request(sources, params, policy)
        job = await self.pipeline.job(
            request,
            cache,
            namespace=namespace,
            started=started,
            task="analyze",
            language=self.language,
            prompt_version=analysis.prompt_version(self.schema),
        )
        outcome, state = await self.pipeline.execute(job, self._work)
        try:
            value = analysis.validate(outcome.analysis, self.schema)
        except ValidationError:
            # Kept for a class of the same shape with other validators: a new answer may fit.
            job = dataclasses.replace(job, policy=dataclasses.replace(job.policy, read=False))
            outcome, state = await self.pipeline.execute(job, self._work)
            value = self._valid(outcome)
        result = self.pipeline.finish(job, outcome, state)
        if isinstance(value, ProductAnalysis):
            value.came_from(result)
        fields = dict(outcome.confidence.get("field_confidence") or {})
        return AnalysisResult(
            value=value.answer if self._boxed else value,  # type: ignore[attr-defined]
            result=result,
            confidence=outcome.confidence.get("confidence"),
            field_confidence={path.removeprefix("answer.") if self._boxed else path: p for path, p in fields.items()},
            confidence_method=outcome.confidence.get("confidence_method"),
        )

    async def request(self, sources: Sequence[Any], params: Mapping[str, Any], policy: Any = None) -> ChatRequest:
        """The first question. The backend is opened only if it cannot tell its capabilities without."""
        from qvl.pipeline import new_request_id

        given = dict(params)
        request_id = given.pop("request_id", None) or new_request_id()
        max_pixels = given.pop("max_pixels", None)
        extra = given.pop("extra", None) or {}
        sampling = sampling_params({"max_tokens": MAX_TOKENS, **given})
        if sampling.n != 1:
            raise ConfigError("an analysis is one answer", hint="leave n out", param="n")
        pictures = await load_pictures(sources, policy or self.pipeline.media)
        if not pictures:
            raise ConfigError("an analysis needs a picture", hint="give a path, URL, bytes or picture")
        have = self.pipeline.backend.peek_capabilities()
        if have is None:
            await self.pipeline.open()
            have = self.pipeline.backend.capabilities
        if have.logprobs and sampling.logprobs is None:
            sampling = dataclasses.replace(sampling, logprobs=0)
        return ChatRequest(
            messages=analysis.build_messages(
                pictures, schema=self.schema, language=self.language, spell_out_schema=not have.json_schema
            ),
            sampling=sampling,
            response_format=analysis.response_format(self.schema) if have.json_schema else ResponseFormat(),
            max_pixels=max_pixels,
            request_id=request_id,
            extra=extra,
        )

    async def _work(self, job: Job, emit: Written) -> Outcome:
        notes: tuple[str, ...] = ()
        if job.request.response_format.kind == "text":
            notes += ("the backend does not enforce schemas: prompted for and validated afterwards",)
        first = (await self.pipeline.generate(job, emit)).result
        try:
            value, result = self._parse(first), first
        except AnalysisError as error:
            again = job.request.replace(
                messages=analysis.retry_messages(job.request.messages, first.text, error, self.language)
            )
            second = (await self.pipeline.generate(dataclasses.replace(job, request=again), emit)).result
            value, result = self._parse(second), _with_usage_of(first, second)
            notes += (f"asked again once: {error.message}",)
        whole, fields = analysis.confidences(result.text, result.logprobs)
        choice = dataclasses.replace(result.choices[0], logprobs=None)
        confidence = {
            "confidence": whole,
            "field_confidence": fields,
            "confidence_method": analysis.CONFIDENCE_METHOD if whole is not None else None,
        }
        if isinstance(value, ProductAnalysis):
            value = value.model_copy(update={**confidence, "language": self.language, "model": result.model})
            kept = value.model_dump(mode="json")
        else:
            # The answer itself: what a model dumps (aliases, computed and excluded fields) it need not read again.
            kept = analysis.load_object(result.text, complete=result.finish_reason != "length")
        return Outcome(
            dataclasses.replace(result, choices=(choice,), notes=result.notes + notes, created_at=time.time()),
            analysis=kept,
            confidence=confidence,
        )

    def _parse(self, result: Result) -> BaseModel:
        return analysis.parse(result.text, self.schema, complete=result.finish_reason != "length")

    def _valid(self, outcome: Outcome) -> BaseModel:
        try:
            return analysis.validate(outcome.analysis, self.schema)
        except ValidationError as exc:
            raise AnalysisError("the analysis does not fit the schema", raw=outcome.result.text) from exc


def _with_usage_of(first: Result, second: Result) -> Result:
    """The second answer, counting the tokens of both."""
    a, b = first.usage, second.usage
    usage = Usage(
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        completion_tokens=a.completion_tokens + b.completion_tokens,
        image_tokens=a.image_tokens + b.image_tokens,
        cached_tokens=a.cached_tokens + b.cached_tokens,
    )
    return dataclasses.replace(second, usage=usage)
