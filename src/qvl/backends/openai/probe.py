"""Probes the actual capabilities of an endpoint.

Servers silently ignore what they do not support: a schema, a picture, `n`. So each feature is requested in a way that
shows if it was honoured: a word that no model would write freely, a picture that must lengthen the prompt, a sampling
parameter that undoes another. Rejected with 400, or ignored, means that the capability is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

from qvl.backends.base import FILES, Capabilities
from qvl.backends.openai.endpoint import Endpoint
from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.probe_features import ACCEPTED, FORMATS, LISTS, SAMPLING, TOOLS, WORDS, Answered, Feature
from qvl.backends.openai.probe_videos import video_form
from qvl.backends.openai.retry import RetryPolicy
from qvl.backends.openai.wire import Dialect, ListedModel, WirePart, encoded
from qvl.backends.openai.wire_videos import VideoForm
from qvl.chunks import Folder
from qvl.errors import BackendResponseError, DeviceMemoryError, RateLimitError, RequestError, UnknownNameError
from qvl.log import logger
from qvl.media import gate
from qvl.sampling import PARAMETERS, SamplingParams
from qvl.types import PROMPT_FIELDS, JsonObject

log: Final = logger("qvl.backends.openai")
MANY_PICTURES: Final = 256
# Of an endpoint that is sent files of videos, where its list of models does not tell: qvl-serve's own defaults.
SOME_VIDEOS: Final = 8
BODY_BYTES: Final = 64 << 20
AT_ONCE: Final = 8
_REFUSALS: Final = (RequestError, UnknownNameError, BackendResponseError, DeviceMemoryError)


@dataclass(frozen=True, slots=True)
class Findings:
    """The capabilities and dialect of an endpoint; `models` are the ids it lists (empty if it has no list).

    `body_bytes` is the most bytes of any request that it tells, None if it tells none.
    """

    capabilities: Capabilities
    dialect: Dialect
    models: tuple[str, ...] = ()
    body_bytes: int | None = None


# Token ids are for another route of an endpoint.
PASSED_ON: Final = frozenset(name for name, _ in PROMPT_FIELDS) - {"prompt"} | {"priority"}
ASSUMED: Final = Findings(
    Capabilities(
        images=MANY_PICTURES,
        sampling=SamplingParams.names(),
        response_formats=frozenset({"json_object", "json_schema", "regex", "choice", "grammar"}),
        tools=True,
        extra_body=True,
        fields=PASSED_ON,
        lists=False,
    ),
    Dialect(),
)


async def probe(endpoint: Endpoint, model: str, *, retry: RetryPolicy) -> Findings:
    """Return the findings on `model` at `endpoint`, from about a dozen requests of a few tokens, eight at a time.

    Raises:
        Failed: the endpoint is down, rejects the key, does not have the model, or sends invalid answers.
    """
    listed = await _list_models(endpoint)
    names = tuple(entry["id"] for entry in listed)
    asker = _Asker(endpoint, model, retry)
    base = await asker.learn_dialect()
    features = [*FORMATS, LISTS, TOOLS, *SAMPLING]
    tasks = [asyncio.ensure_future(asker.has(feature, base)) for feature in features]
    seeing, accepting = asyncio.ensure_future(asker.sees(base)), asyncio.ensure_future(asker.accepts(ACCEPTED))
    watching = asyncio.ensure_future(asker.video_form(seeing))
    await _together([seeing, accepting, watching, *tasks])
    form = watching.result()
    have = {feature.name for feature, task in zip(features, tasks, strict=True) if task.result()} | accepting.result()
    sampling = {"max_tokens"} | (have & PARAMETERS.keys())
    if asker.dialect.sampled:
        sampling |= {name for name, known in PARAMETERS.items() if known.sent == "always"}
    pinned = frozenset(name for name in sampling if PARAMETERS[name].sent == "pinned")
    entry: Mapping[str, object] = next((entry for entry in listed if entry["id"] == model), {})
    videos, body = _told(entry, "max_videos"), _told(entry, "max_body_bytes")
    capabilities = Capabilities(
        images=MANY_PICTURES if seeing.result() else 0,
        # The times of frames are told once for a request.
        videos={"file": SOME_VIDEOS if videos is None else videos, "frames": 1, None: 0}[form],
        video_form=form or "",
        body_bytes=(BODY_BYTES if body is None else body) if form == FILES else None,
        max_context=_max_context(entry),
        sampling=frozenset(sampling),
        response_formats=frozenset(have & {feature.name for feature in FORMATS}),
        tools="tools" in have,
        extra_body=True,
        # An endpoint that knows vLLM's fields is sent the salt, too.
        fields=PASSED_ON | {"cache_salt"} if pinned else PASSED_ON,
        lists="lists" in have,
    )
    return Findings(capabilities, replace(asker.dialect, pinned=pinned, videos=form), names, body)


def common(findings: list[Findings]) -> Capabilities:
    """Return the capabilities that all of several endpoints have."""
    every = [one.capabilities for one in findings]
    forms = {have.video_form for have in every}
    bodies = [have.body_bytes for have in every if have.body_bytes is not None]
    contexts = [have.max_context for have in every if have.max_context is not None]
    return Capabilities(
        images=min(have.images for have in every),
        # One cache keeps the answers of all, so all are sent videos in one form.
        videos=min(have.videos for have in every) if len(forms) == 1 else 0,
        video_form=forms.pop() if len(forms) == 1 else "",
        body_bytes=min(bodies, default=None),
        max_context=min(contexts, default=None),
        sampling=frozenset.intersection(*(have.sampling for have in every)),
        response_formats=frozenset.intersection(*(have.response_formats for have in every)),
        tools=all(have.tools for have in every),
        extra_body=all(have.extra_body for have in every),
        top_logprobs=min(have.top_logprobs for have in every),
        fields=frozenset.intersection(*(have.fields for have in every)),
        lists=all(have.lists for have in every),
    )


async def _together(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for all tasks; a failure of one cancels the others."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _list_models(endpoint: Endpoint) -> list[ListedModel]:
    try:
        return await endpoint.models()
    except Failed as failed:
        # Many endpoints have no such list; one that is not there, or refuses the key, will not answer the rest either.
        if failed.impact is Impact.DOWN:
            raise
        return []


def _max_context(entry: Mapping[str, object]) -> int | None:
    names = ("max_model_len", "context_length", "max_context_length", "context_window")
    return next((value for name in names if isinstance(value := entry.get(name), int) and value > 0), None)


def _told(entry: Mapping[str, object], name: str) -> int | None:
    """Return a limit of qvl-serve's own, of its list of models; None if it is not told."""
    value = entry.get(name)
    return value if isinstance(value, int) and value >= 0 else None


class _Asker:
    """Sends probe requests in the dialect learnt so far."""

    def __init__(self, endpoint: Endpoint, model: str, retry: RetryPolicy) -> None:
        self._endpoint, self._model, self._retry = endpoint, model, retry
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.dialect = Dialect()

    async def learn_dialect(self) -> Answered:
        """Return the answer to a plain question; adapts the dialect while a rejection names a field."""
        for _ in range(4):
            try:
                return await self.ask(WORDS, {}, max_tokens=8)
            except Failed as failed:
                if not isinstance(failed.error, RequestError) or not self._adapt(failed.error):
                    raise
        return await self.ask(WORDS, {}, max_tokens=8)

    def _adapt(self, error: RequestError) -> bool:
        complaint = (error.param or error.message).lower()
        before = self.dialect
        if "max_completion_tokens" in complaint or (
            complaint == "max_tokens" and "max_completion_tokens" in error.message
        ):
            self.dialect = replace(before, max_tokens="max_completion_tokens")
        elif "stream_options" in complaint:
            self.dialect = replace(before, stream_options=False)
        elif "temperature" in complaint or "top_p" in complaint:
            self.dialect = replace(before, sampled=False)
        return self.dialect != before

    async def has(self, feature: Feature, base: Answered) -> bool:
        if not self.dialect.sampled and "temperature" in feature.fields:
            return False
        answer = await self._ask_unless_refused(feature.question, feature.fields, max_tokens=feature.max_tokens)
        return answer is not None and feature.obeyed(answer, base)

    async def accepts(self, fields: Mapping[str, Mapping[str, object]]) -> set[str]:
        """Return the names whose fields are accepted: all in one request, one by one only if that is rejected."""
        together = {name: value for several in fields.values() for name, value in several.items()}
        if await self._ask_unless_refused(WORDS, together, max_tokens=1) is not None:
            return set(fields)
        if len(fields) == 1:
            return set()
        alone = await asyncio.gather(*(self.accepts({name: several}) for name, several in fields.items()))
        return set().union(*alone)

    async def sees(self, base: Answered) -> bool:
        """True if a picture is accepted and makes the prompt longer than that of `base`, without a picture."""
        parts: list[WirePart] = [
            {"type": "image_url", "image_url": {"url": small_picture()}},
            {"type": "text", "text": WORDS},
        ]
        answer = await self._ask_unless_refused(parts, {}, max_tokens=1)
        if answer is None:
            return False
        before, after = base.usage.prompt_tokens, answer.usage.prompt_tokens
        return after > before if before and after else True

    async def video_form(self, seeing: asyncio.Future[bool]) -> VideoForm | None:
        """Return the form in which videos are taken; None for an endpoint that sees nothing, or no videos."""

        async def prompt_tokens(part: WirePart, fields: JsonObject) -> int:
            try:
                answer = await self.ask([part, {"type": "text", "text": WORDS}], fields, max_tokens=1)
            except Failed as failed:
                # Gateways refuse a video in every way (403, 502, silence); words and pictures work without it.
                log.debug("no videos", error=str(failed.error))
                return 0
            return answer.usage.prompt_tokens

        return await video_form(prompt_tokens, small_picture()) if await seeing else None

    async def _ask_unless_refused(
        self, content: str | list[WirePart], fields: Mapping[str, object], *, max_tokens: int
    ) -> Answered | None:
        """Return the answer; None if the endpoint rejects a feature in the request."""
        try:
            return await self.ask(content, fields, max_tokens=max_tokens)
        except Failed as failed:
            if isinstance(failed.error, _REFUSALS):
                return None
            raise

    async def ask(self, content: str | list[WirePart], fields: Mapping[str, object], *, max_tokens: int) -> Answered:
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            self.dialect.max_tokens: max_tokens,
        }
        if self.dialect.stream_options:
            body["stream_options"] = {"include_usage": True}
        if self.dialect.sampled:
            body["temperature"] = 0.0
        body.update(fields)
        attempt = 0
        while True:
            try:
                async with self._slots:
                    return await self._once(body)
            except Failed as failed:
                # A connection that broke after it was made may be an accident; one that cannot be made is not.
                broke = failed.impact is Impact.DOWN and not failed.untouched
                busy = isinstance(failed.error, RateLimitError) or failed.error.status == 503
                if not broke and (not busy or failed.repeat is not Repeat.ANYWHERE or failed.impact is Impact.DOWN):
                    raise
                if attempt >= self._retry.max_retries:
                    raise
                await asyncio.sleep(self._retry.delay(attempt, failed.retry_after))
                attempt += 1

    async def _once(self, body: Mapping[str, object]) -> Answered:
        folder = Folder(want_logprobs=True)
        async with aclosing(await self._endpoint.answer((encoded(body),))) as answer:
            while chunks := await answer.read():
                for chunk in chunks:
                    folder.add(chunk)
        return Answered(folder.choices(), folder.usage, folder.prompt)


def small_picture() -> str:
    """Return a picture of a red square as a data URL."""
    from PIL import Image

    return gate.load(Image.new("RGB", (64, 64), (208, 32, 32))).data_url()
