"""The flow of `analyze()`: prompt with the schema, parse the answer, retry once if it does not fit, cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ValidationError

from qvl import analysis
from qvl.analysis.confidence import CALIBRATED
from qvl.analysis.product import AnalysisResult, ProductAnalysis, ProductFields
from qvl.analysis.schema_types import schema_type
from qvl.calibration.calibration_file import PAGES, PLACES
from qvl.calibration.calibrator import AnalysisJudge, Sureness, check_abstain, check_adapter
from qvl.errors import AnalysisError, ConfigError, RequestError
from qvl.evidence.answer_form import EVIDENCE, PAGE_OF, AnswerForm, ReadAnswer, evidence_fields, has_shapes, shapes_in
from qvl.evidence.coordinates import Frame
from qvl.evidence.prompts import EVIDENCE_VERSION, PAGES_VERSION, evidence_sentence, pages_sentence
from qvl.evidence.shapes import Box, Located, Point
from qvl.ids import new_request_id
from qvl.media.document import Document
from qvl.media.video import paged, still
from qvl.pipeline.call import Call, Generate
from qvl.pipeline.job import Confidence, Outcome
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.pipeline.parse_request import (
    OF_REQUEST,
    own_extra,
    read_template_kwargs,
    request_limits,
    request_pages,
    request_sampling,
    sampling_params,
    unread_pictures,
)
from qvl.pipeline.single_flight import Written
from qvl.types import ChatRequest, JsonObject, ResponseFormat, Result, Usage

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.backends.base import Backend, Capabilities
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.calibration.calibrator import Calibrator
    from qvl.media.policy import MediaPolicy
    from qvl.media.video import Medium
    from qvl.pipeline.job import Job
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.pipeline.parse_request import AnalyzeParams

MAX_TOKENS: Final = 512
BUNDLED: Final = "bundled"


class AnalyzeCall(Call[AnalysisResult[object]]):
    """The analysis of one product shown in `sources` (pictures, or message parts of them); `params` as in `ask`.

    What the calibration is not of is refused; with `raw_elsewhere` it has raw confidences, unless it must abstain.
    """

    task = "analyze"
    needs_capabilities = True

    def __init__(
        self,
        sources: Sequence[PictureLike],
        *,
        schema: SchemaLike,
        language: str,
        backend: Backend,
        cache: CacheMode | CachePolicy | None,
        params: AnalyzeParams,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
        started: float | None = None,
        calibrator: Calibrator | None = None,
        raw_elsewhere: bool = False,
    ) -> None:
        super().__init__(cache, namespace=namespace, policy=policy, started=started)
        self._params = params
        self._type = schema_type(schema)
        self.schema = self._type.model
        self.language = analysis.check_language(language)
        self._request_id = params.get("request_id") or new_request_id()
        self._extra = own_extra(params.get("extra"))
        self._template_kwargs = read_template_kwargs(params.get("chat_template_kwargs"), self._extra)
        sampling_of_videos = request_sampling(params.get("video"), self._extra)
        limits = request_limits(params.get("max_pixels"), params.get("min_pixels"), self._extra)
        common = UnreadPicture("", limits, sampling_of_videos, pages=request_pages(params.get("pages")))
        self.pictures = unread_pictures(sources, common)
        sampling = {name: value for name, value in params.items() if name not in OF_REQUEST}
        self._sampling = sampling_params({"max_tokens": MAX_TOKENS, **sampling})
        if self._sampling.n != 1:
            raise ConfigError("an analysis must be one answer", hint="leave n out", param="n")
        if not sources:
            raise ConfigError("an analysis needs a picture", hint="give a path, URL, bytes or picture")
        self.prompt_version = analysis.prompt_version(self.schema)
        self._backend = backend
        evidence = params.get("evidence", False)
        if not isinstance(evidence, bool):
            raise ConfigError(f"evidence={str(evidence)[:40]!r} is neither True nor False", param="evidence")
        plain = self.schema is ProductAnalysis and not evidence
        self._asked: JsonObject = {} if plain else analysis.generation_schema(self.schema)
        self._fields = evidence_fields(self._asked) if evidence else ()
        self._placed = bool(self._fields) or has_shapes(self._asked)
        self._form: AnswerForm | None = None
        self._calibrator = calibrator
        self._raw_elsewhere = raw_elsewhere
        self._abstain = params.get("abstain")
        check_abstain(self._abstain, calibrator)
        self._adapter = params.get("adapter", "")
        check_adapter(self._adapter, calibrator)
        self._judge: AnalysisJudge | None = None

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> AnalysisResult[object]:
        data, sure = outcome.analysis, self._raw(outcome)
        if self._judge is not None and data is not None:
            own = ProductFields.model_fields if self.schema is ProductAnalysis else data
            sure, told = self._judge.judge(sure, {name: data[name] for name in own if name in data})
            data = {**data, **told}
        try:
            value = analysis.validate(data, self.schema)
        except ValidationError as exc:
            raise AnalysisError("the answer does not fit the schema", raw=outcome.result.text) from exc
        result = finish()
        facts = {item.name: getattr(sure, item.name) for item in dataclasses.fields(sure)}
        if isinstance(value, ProductAnalysis):
            if self._judge is not None:
                value = value.model_copy(update=facts)
            value.came_from(result)
        evidence = _evidence(outcome.confidence)
        pages = dict(outcome.confidence.get("pages") or {})
        shown = self.shown()
        for name, item in evidence.items():
            if item is not None and len(shown) > 1 and (page := shown[item.shape.picture]) is not None:
                pages[name] = page
        if self._judge is not None and evidence:
            evidence, unsure = self._judge.judge_evidence(evidence)
            facts["abstained"] = {**sure.abstained, **unsure}
            if isinstance(value, ProductAnalysis):
                value.abstained = facts["abstained"]
        if isinstance(value, ProductAnalysis) and self._fields:
            value.evidence = evidence
        shapes = shapes_in(data, self._asked) if self._placed and data is not None else ()
        outer = self._type.outer
        return AnalysisResult(
            value=self._type.value(value),
            result=result,
            evidence=evidence,
            pages={outer(path): page for path, page in pages.items()},
            shapes=tuple([_located(outer(path), shape, sure) for path, shape in shapes]),
            **facts,
        )

    def _numbers(self, media: Sequence[Medium]) -> tuple[int, ...]:
        """Return the numbers of the pages among which each field's is asked for; boxes tell them by themselves."""
        documents = [medium for medium in media if isinstance(medium, Document)]
        if self._placed or len(documents) != 1 or len(documents[0].pages) < 2:
            return ()
        taken = analysis.generation_schema(self.schema).get("properties") or {PAGE_OF}
        return () if PAGE_OF in taken else documents[0].numbers

    def of(self, sources: Sequence[PictureLike], schema: SchemaLike) -> AnalyzeCall:
        """Return the call of another schema for other pictures, with this one's parameters and raw confidences."""
        params = self._params.copy()
        params.pop("pages", None)
        return AnalyzeCall(
            sources,
            schema=schema,
            language=self.language,
            backend=self._backend,
            cache=self.cache,
            params=params,
            namespace=self.namespace,
            policy=self.policy,
        )

    def joined(self, data: JsonObject, found: AnalysisResult[object]) -> AnalysisResult[object]:
        """Return `found`, merged from several answers to calls of `of`, with `data` as a value of this call's schema.

        Raises:
            AnalysisError: `data` does not fit the schema.
        """
        try:
            value = analysis.validate(data, self.schema)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            what = f"merged from its pages, {where} does not fit the schema: {first['msg']}"
            raise AnalysisError(what, raw=found.result.text, hint="let fields that may be missing be null") from exc
        if isinstance(value, ProductAnalysis):
            told = {name: getattr(found, name) for name in ("confidence", "field_confidence", "confidence_method")}
            told |= {"language": self.language, "model": found.result.model}
            value = value.model_copy(update=told | ({"evidence": found.evidence} if self._fields else {}))
            value.came_from(found.result)
        return dataclasses.replace(
            found,
            value=self._type.value(value),
            pages={self._type.outer(path): page for path, page in found.pages.items()},
            field_confidence={self._type.outer(path): sure for path, sure in found.field_confidence.items()},
        )

    def refuse_long(self, name: str) -> None:
        """Raise RequestError if the answers to single pages cannot be merged for this call."""
        what = f"{name} has more pages than one request takes"
        if has_shapes(self._asked):
            raise RequestError(f"{what}, and boxes as fields cannot be merged", hint="name fewer pages", param="pages")
        calibrator = self._calibrator_of_analyses()
        if calibrator is None:
            return
        # Merged from several answers, a value has no confidence that a calibration could be of.
        if calibrator.thresholds(self._abstain) is not None:
            raise RequestError(f"{what}, and abstain is for one request", hint="name one page", param="abstain")
        if not self._raw_elsewhere:
            what = f"{what}, and the calibration is of one request"
            raise RequestError(what, hint="name one page, or ask without it", param="calibration")

    def shown(self) -> list[int | None]:
        """Return the page of each picture of the request, None for one that is no page; known once it is loaded."""
        pages: list[int | None] = []
        for medium in self.loaded or ():
            pages += medium.numbers if isinstance(medium, Document) else [None]
        return pages

    def _raw(self, outcome: Outcome) -> Sureness:
        """Return the model's own confidences, by the paths that the user sees."""
        kept = outcome.confidence
        fields = {self._type.outer(path): sure for path, sure in (kept.get("field_confidence") or {}).items()}
        whole = kept.get("confidence")
        return Sureness(whole, fields, kept.get("confidence_method"), whole, fields)

    def _calibrator_of_analyses(self) -> Calibrator | None:
        calibrator = self._calibrator
        if calibrator is None or (calibrator.calibration.analysis is None and self._abstain is None):
            return None
        return calibrator

    def _judged(self) -> AnalysisJudge | None:
        """Return what judges the answer; None without a calibration of analyses."""
        calibrator = self._calibrator_of_analyses()
        if calibrator is None:
            return None
        if self._raw_elsewhere and calibrator.thresholds(self._abstain) is None:
            schema = analysis.generation_schema(self.schema)
            if not calibrator.covers(self.prompt_version, self.language, schema):
                return None
        # Before an answer is paid for.
        calibrator.check()
        return AnalysisJudge(
            calibrator,
            prompt_version=self.prompt_version,
            language=self.language,
            schema=self._type,
            abstain=self._abstain,
        )

    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        assert have is not None
        sampling = self._sampling
        if have.logprobs and sampling.logprobs is None:
            sampling = dataclasses.replace(sampling, logprobs=0)
        asked, sentence = None, ""
        numbers = self._numbers(pictures)
        if numbers:
            own = analysis.generation_schema(self.schema)
            self._form = AnswerForm(own, (), pages=numbers)
            asked, sentence = self._form.asked(), pages_sentence(self.language)
            self.prompt_version = f"{analysis.prompt_version(self.schema)}{PAGES}{PAGES_VERSION}"
        if self._placed:
            coordinates = self._backend.coordinates
            shown = map(still, paged(pictures))
            frames = tuple([Frame.of(number, picture, coordinates) for number, picture in enumerate(shown)])
            self._form = AnswerForm(self._asked, frames, self._fields)
            asked = self._form.asked()
            sentence = evidence_sentence(self.language, coordinates.convention) if self._fields else ""
            self.prompt_version = version_of(self.schema, self._backend, evidence=bool(self._fields))
        self._judge = self._judged()
        return ChatRequest(
            messages=analysis.build_messages(
                list(pictures),
                schema=self.schema,
                language=self.language,
                spell_out_schema=not have.json_schema,
                asked=asked,
                evidence=sentence,
            ),
            sampling=sampling,
            response_format=analysis.response_format(self.schema, asked) if have.json_schema else ResponseFormat(),
            request_id=self._request_id,
            extra=self._extra,
            adapter=self._adapter,
            cache_salt=self._params.get("cache_salt", ""),
            priority=self._params.get("priority", 0),
            chat_template_kwargs=self._template_kwargs,
            reasoning_effort=self._params.get("reasoning_effort"),
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
        match = analysis.find(result.text, self.schema, complete=result.finish_reason != "length", form=self._form)
        read = ReadAnswer(match.value) if self._form is None else self._form.read(match.value)
        beside = {name: f"{EVIDENCE}.{name}" for name in self._fields}
        told = match.value.get(PAGE_OF) if self._form is not None and self._form.pages else None
        of_pages = [f"{PAGE_OF}.{name}" for name in told] if isinstance(told, dict) else []
        whole, fields = analysis.confidences(
            result.text, result.logprobs, match.start, wholes=read.wholes, beside=[*beside.values(), *of_pages]
        )
        fields = {path: each for path, each in fields.items() if path not in of_pages}
        sure = {name: fields.pop(path, None) for name, path in beside.items()}
        notes += tuple(dict.fromkeys(read.notes))
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
            kept = read.value
        if self._fields:
            confidence["evidence"] = {
                name: None if item is None else dataclasses.replace(item, confidence=sure[name]).to_json()
                for name, item in read.evidence.items()
            }
        if read.pages:
            confidence["pages"] = read.pages
        return Outcome(
            dataclasses.replace(result, choices=(choice,), notes=result.notes + notes, created_at=time.time()),
            analysis=kept,
            confidence=confidence,
        )

    def _parse(self, result: Result) -> BaseModel:
        try:
            complete = result.finish_reason != "length"
            return analysis.parse(result.text, self.schema, complete=complete, form=self._form)
        except AnalysisError as error:
            if result.model == BUNDLED and self.schema is not ProductAnalysis:
                # More tokens, or another try, would not help it.
                error.hint = (
                    "the bundled model knows no schema but its own analysis; name a real one, "
                    "such as Qwen/Qwen3-VL-4B-Instruct"
                )
            raise


def version_of(schema: type[BaseModel], backend: Backend, *, evidence: bool) -> str:
    """Return the version of the prompt of an analysis by `backend`; where there are places, it names their form."""
    plain = analysis.prompt_version(schema)
    if not evidence and not has_shapes(analysis.generation_schema(schema)):
        return plain
    return f"{plain}{PLACES}{EVIDENCE_VERSION}-{backend.coordinates.convention}"


def _located(label: str, shape: Box | Point, sure: Sureness) -> Located:
    item = Located(label, **{shape.form: shape}, confidence=sure.field_confidence.get(label))  # type: ignore[arg-type]
    if sure.confidence_method != CALIBRATED:
        return item
    raw = sure.raw_field_confidence.get(label)
    return dataclasses.replace(item, raw_confidence=raw, confidence_method=CALIBRATED)


def _evidence(kept: Confidence) -> dict[str, Located | None]:
    told = kept.get("evidence") or {}
    try:
        return {name: None if item is None else Located.from_json(item) for name, item in told.items()}
    except ConfigError as exc:
        raise AnalysisError("the kept evidence cannot be read", raw=str(told)) from exc


def _with_usage_of(first: Result, second: Result) -> Result:
    """Return `second` with the token counts of both answers."""
    return dataclasses.replace(second, usage=Usage.sum((first.usage, second.usage)))
