"""The flow of `locate()`: ask in the model's own coordinates, read the boxes, map them to the original, cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypedDict

from qvl.analysis.confidence import CALIBRATED
from qvl.calibration.calibrator import check_adapter
from qvl.errors import AnalysisError, ConfigError
from qvl.evidence.coordinates import Frame
from qvl.evidence.locate import locate_schema, read_located, read_targets
from qvl.evidence.located import Locations
from qvl.evidence.prompts import LOCATE_VERSION, locate_prompt
from qvl.evidence.shapes import Located
from qvl.media.video import still
from qvl.pipeline.call import Call, Generate
from qvl.pipeline.check_names import check_names
from qvl.pipeline.job import Outcome
from qvl.pipeline.parse_parts import PARTS, UnreadPicture, read_part
from qvl.pipeline.parse_request import draft_request
from qvl.pipeline.single_flight import Written
from qvl.types import JsonObject, ResponseFormat, Result, TextPart

if TYPE_CHECKING:
    from qvl.backends.base import Capabilities
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.media.page_choice import PagesLike
    from qvl.media.policy import MediaPolicy
    from qvl.media.video import Medium
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.job import Job
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.types import ChatRequest, JsonMapping

MAX_TOKENS: Final = 2048


class LocateParams(TypedDict, total=False):
    """Keyword arguments of `locate()`."""

    max_tokens: int | None
    seed: int | None
    max_pixels: int | None
    min_pixels: int | None
    pages: PagesLike | None
    cache_salt: str
    request_id: str | None
    extra: JsonMapping | None
    chat_template_kwargs: JsonMapping | None
    priority: int
    adapter: str


class LocateCall(Call[Locations]):
    """The call of `locate()`: one picture, one or several targets; `params` as of `locate`.

    With a calibration of boxes their confidences are calibrated (points have none), and what is less sure than the
    pipeline's `abstain` is left out with a note.
    """

    task = "locate"
    needs_capabilities = True

    def __init__(
        self,
        picture: PictureLike,
        targets: str | Iterable[str],
        executor: Executor,
        cache: CacheMode | CachePolicy | None,
        params: LocateParams,
        *,
        points: bool = False,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
        started: float | None = None,
    ) -> None:
        super().__init__(cache, namespace=namespace, policy=policy, started=started)
        check_names("locate", params, LocateParams.__annotations__, "points", "cache")
        if isinstance(picture, list | tuple):
            raise ConfigError("locate() takes one picture", hint="call it for each, or use map(pictures, locate=…)")
        self.targets = read_targets(targets)
        self.points = points
        self._backend = executor.backend
        self._calibrator = executor.calibrator
        check_adapter(params.get("adapter", ""), self._calibrator)
        self._coordinates = self._backend.coordinates
        part = read_part(picture, "picture") if isinstance(picture, PARTS) else UnreadPicture(picture)
        if isinstance(part, TextPart):
            raise ConfigError("the picture is a text", hint="a path, URL, bytes or image", param="picture")
        limit = params.get("max_tokens")
        wanted: LocateParams = {**params, "max_tokens": MAX_TOKENS if limit is None else limit}
        self._draft = draft_request([{"role": "user", "content": [part]}], **wanted)
        self.pictures = self._draft.pictures

    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        assert have is not None
        # Known only now: an endpoint's model may be named when it is opened.
        coordinates = self._coordinates = self._backend.coordinates
        frame = Frame.of(0, still(pictures[0]), coordinates)
        self.prompt_version = f"locate-{LOCATE_VERSION}-{coordinates.convention}"
        if self._calibrator is not None and not self.points:
            # Before an answer is paid for.
            self._calibrator.check_targets(self.targets, self.prompt_version)
        request = self._draft.finished(pictures)
        text = TextPart(locate_prompt(self.targets, points=self.points, convention=coordinates.convention))
        (message,) = request.messages
        sampling = request.sampling
        if have.logprobs:
            sampling = dataclasses.replace(sampling, logprobs=0)
        form = ResponseFormat()
        if have.json_schema:
            schema = locate_schema(self.targets, frame, points=self.points, list_on_top=have.lists)
            form = ResponseFormat("json_schema", schema=schema, name="located")
        message = message.with_parts((*message.parts, text))
        return request.replace(messages=(message,), sampling=sampling, response_format=form)

    async def run(self, generate: Generate, job: Job, emit: Written) -> Outcome:
        result = (await generate(job, emit)).result
        coordinates = self._coordinates
        frame = Frame.of(0, job.request.pictures[0], coordinates)
        found, notes = read_located(
            result.text,
            result.logprobs,
            self.targets,
            frame,
            points=self.points,
            complete=result.finish_reason != "length",
        )
        if coordinates.assumed:
            notes.append(
                f"coordinates are read as the prompt asks for them, 0 to 1000: nothing tells what {result.model!r} "
                "was trained to write (an endpoint's option box_convention does)"
            )
        choice = dataclasses.replace(result.choices[0], logprobs=None)
        told = dataclasses.replace(
            result, choices=(choice,), notes=(*result.notes, *dict.fromkeys(notes)), created_at=time.time()
        )
        kept: JsonObject = {"located": [item.to_json() for item in found]}
        return Outcome(told, analysis=kept)

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> Locations:
        try:
            found = [Located.from_json(item) for item in (outcome.analysis or {})["located"]]
        except (ConfigError, KeyError, TypeError, AttributeError) as exc:
            raise AnalysisError("the kept answer is not one of boxes or points", raw=outcome.result.text) from exc
        result = finish()
        if self._calibrator is None or self.points:
            return Locations(found, result)
        told = [self._calibrator.located(item, self.prompt_version) for item in found]
        unsure = [
            f"{item.label!r}: {reason}" + ("" if item.confidence is None else f", {item.confidence:.2f}")
            for item, reason in told
            if reason
        ]
        notes = [f"left out a box for {one}" for one in unsure]
        if len(self.targets) > 1 and any(item.confidence_method == CALIBRATED for item, _ in told):
            # What else is looked for changes an answer.
            notes.append("the confidences were calibrated on each target asked for alone")
        result = dataclasses.replace(result, notes=(*result.notes, *notes))
        return Locations([item for item, reason in told if reason is None], result)
