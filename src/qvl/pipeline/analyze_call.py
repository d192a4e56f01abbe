"""The flow of `analyze()`: prompt with the schema, parse the answer, retry once if it does not fit, cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ValidationError

from qvl import analysis
from qvl.analysis.product import AnalysisResult, ProductAnalysis
from qvl.analysis.schema_types import schema_type
from qvl.errors import AnalysisError, ConfigError
from qvl.ids import new_request_id
from qvl.pipeline.call import Call, Generate
from qvl.pipeline.job import Confidence, Outcome
from qvl.pipeline.parse_request import OF_REQUEST, own_extra, request_limits, sampling_params, unread_pictures
from qvl.pipeline.single_flight import Written
from qvl.types import ChatRequest, ResponseFormat, Result, Usage

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.backends.base import Capabilities
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.job import Job
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.pipeline.parse_request import AnalyzeParams

MAX_TOKENS: Final = 512
BUNDLED: Final = "bundled"


class AnalyzeCall(Call[AnalysisResult[object]]):
    """The analysis of one product shown in `sources` (pictures, or message parts of them); `params` as in `ask`."""

    task = "analyze"
    needs_capabilities = True

    def __init__(
        self,
        sources: Sequence[PictureLike],
        *,
        schema: SchemaLike,
        language: str,
        cache: CacheMode | CachePolicy | None,
        params: AnalyzeParams,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
        started: float | None = None,
    ) -> None:
        super().__init__(cache, namespace=namespace, policy=policy, started=started)
        self._type = schema_type(schema)
        self.schema = self._type.model
        self.language = analysis.check_language(language)
        self._request_id = params.get("request_id") or new_request_id()
        self._extra = own_extra(params.get("extra"))
        limits = request_limits(params.get("max_pixels"), params.get("min_pixels"), self._extra)
        self.pictures = unread_pictures(sources, limits)
        sampling = {name: value for name, value in params.items() if name not in OF_REQUEST}
        self._sampling = sampling_params({"max_tokens": MAX_TOKENS, **sampling})
        if self._sampling.n != 1:
            raise ConfigError("an analysis must be one answer", hint="leave n out", param="n")
        if not sources:
            raise ConfigError("an analysis needs a picture", hint="give a path, URL, bytes or picture")
        self.prompt_version = analysis.prompt_version(self.schema)

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> AnalysisResult[object]:
        try:
            value = analysis.validate(outcome.analysis, self.schema)
        except ValidationError as exc:
            raise AnalysisError("the answer does not fit the schema", raw=outcome.result.text) from exc
        result = finish()
        if isinstance(value, ProductAnalysis):
            value.came_from(result)
        fields = dict(outcome.confidence.get("field_confidence") or {})
        return AnalysisResult(
            value=self._type.value(value),
            result=result,
            confidence=outcome.confidence.get("confidence"),
            field_confidence={
                path.removeprefix("answer.") if self._type.boxed else path: sure for path, sure in fields.items()
            },
            confidence_method=outcome.confidence.get("confidence_method"),
        )

    def request(self, pictures: Sequence[Picture], have: Capabilities | None) -> ChatRequest:
        assert have is not None
        sampling = self._sampling
        if have.logprobs and sampling.logprobs is None:
            sampling = dataclasses.replace(sampling, logprobs=0)
        return ChatRequest(
            messages=analysis.build_messages(
                list(pictures), schema=self.schema, language=self.language, spell_out_schema=not have.json_schema
            ),
            sampling=sampling,
            response_format=analysis.response_format(self.schema) if have.json_schema else ResponseFormat(),
            request_id=self._request_id,
            extra=self._extra,
        )

    async def run(self, generate: Generate, job: Job, emit: Written) -> Outcome:
        notes: tuple[str, ...] = ()
        if job.request.response_format.kind == "text":
            notes += ("the backend does not enforce schemas: the schema is in the prompt and validated afterwards",)
        first = (await generate(job, emit)).result
        try:
            value, result = self._parse(first), first
        except AnalysisError as error:
            again = job.request.replace(
                messages=analysis.retry_messages(job.request.messages, first.text, error, self.language)
            )
            second = (await generate(dataclasses.replace(job, request=again), emit)).result
            value, result = self._parse(second), _with_usage_of(first, second)
            notes += (f"retried once: {error.message}",)
        match = analysis.find(result.text, self.schema, complete=result.finish_reason != "length")
        whole, fields = analysis.confidences(result.text, result.logprobs, match.start)
        choice = dataclasses.replace(result.choices[0], logprobs=None)
        confidence: Confidence = {
            "confidence": whole,
            "field_confidence": fields,
            "confidence_method": analysis.CONFIDENCE_METHOD if whole is not None else None,
        }
        if isinstance(value, ProductAnalysis):
            value = value.model_copy(update={**confidence, "language": self.language, "model": result.model})
            kept = value.model_dump(mode="json")
        else:
            # The answer itself: what a model dumps (aliases, computed and excluded fields) it need not read again.
            kept = match.value
        return Outcome(
            dataclasses.replace(result, choices=(choice,), notes=result.notes + notes, created_at=time.time()),
            analysis=kept,
            confidence=confidence,
        )

    def _parse(self, result: Result) -> BaseModel:
        try:
            return analysis.parse(result.text, self.schema, complete=result.finish_reason != "length")
        except AnalysisError as error:
            if result.model == BUNDLED and self.schema is not ProductAnalysis:
                # More tokens, or another try, would not help it.
                error.hint = (
                    "the bundled model knows no schema but its own analysis; name a real one, "
                    "such as Qwen/Qwen3-VL-4B-Instruct"
                )
            raise


def _with_usage_of(first: Result, second: Result) -> Result:
    """Return `second` with the token counts of both answers."""
    counts = zip(dataclasses.astuple(first.usage), dataclasses.astuple(second.usage), strict=True)
    return dataclasses.replace(second, usage=Usage(*(a + b for a, b in counts)))
