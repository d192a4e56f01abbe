"""Checks of an OpenAI-compatible endpoint: models, schemas, logprobs, and what the probes of `qvl parity` look at."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.ascend.report import Finding
from qvl.errors import QvlError
from qvl.parity.side_probes import PixelBudget, probes
from qvl.parity.sides import LiveSide
from qvl.parity.stored import sample
from qvl.pipeline.async_pipeline import AsyncPipeline

if TYPE_CHECKING:
    import httpx
    from PIL import Image

    from qvl.parity.side_probes import Probed
    from qvl.types import JsonMapping, JsonObject

_TIMEOUT = 120.0
# Of a probe's answer: enough to see it repeated.
_TOKENS = 32
_QUESTION = "What brand is printed in this picture? Answer with the brand."
# Of a picture token.
_TOKEN_PIXELS = 1024
_SCHEMA = {
    "type": "object",
    "properties": {"canary": {"type": "string", "enum": ["QVL-7F3A"]}},
    "required": ["canary"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One chat answer: HTTP status, text, the log-probabilities of its tokens, and the error message."""

    status: int
    text: str = ""
    logprobs: tuple[float, ...] = ()
    prompt_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class EndpointClient:
    """A client that sends test requests to one base URL and model; `budget` is what the server tells of pictures."""

    client: httpx.Client
    base: str
    model: str
    budget: PixelBudget | None = None

    def ask(self, image: Image.Image | None, question: str, **fields: object) -> ChatAnswer:
        """Send one greedy chat request, with further body `fields`, and return its answer."""
        content: list[JsonObject] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        response = self.client.post(_joined(self.base, "/chat/completions"), json={**body, "max_tokens": 24, **fields})
        if response.status_code != 200:
            return ChatAnswer(response.status_code, error=_error_text(response))
        return _answer(response.json())


def check(url: str, *, api_key: str | None = None, model: str | None = None) -> Iterator[Finding]:
    """Yield findings about the endpoint at `url` (with or without `/v1`); `model` None is the first that it lists."""
    import httpx

    path, mark, query = url.partition("?")
    # What has a query is a gateway's address, which is given whole.
    base = path.rstrip("/") + ("" if query or path.rstrip("/").endswith("/v1") else "/v1") + mark + query
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(timeout=_TIMEOUT, headers=headers, trust_env=False) as client:
            models, finding = _models(client, base, model)
            yield finding
            if finding.status != "fail":
                name = model or next(iter(models))
                endpoint = EndpointClient(client, base, name, _budget(models[name]))
                yield from _capabilities(endpoint, api_key)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        yield Finding.fail(
            "endpoint",
            f"{base.partition('?')[0]}: {type(error).__name__}: {error}",
            "check address and port; `docker logs` of the service shows why it does not answer",
        )


def _joined(base: str, path: str) -> str:
    """Return `base` with `path` appended to its path, before its query."""
    address, mark, query = base.partition("?")
    return address.rstrip("/") + path + mark + query


def data_url(image: Image.Image) -> str:
    """Return the picture as a PNG data URL; its eXIf chunk keeps the EXIF orientation."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=image.getexif())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _budget(model: JsonMapping) -> PixelBudget | None:
    """Return the pixel budget that a model of a list tells, as qvl-serve does; None for others."""
    rules = model.get("processor")
    low, high = (rules.get(end) if isinstance(rules, Mapping) else None for end in ("min_pixels", "max_pixels"))
    return PixelBudget(low, high) if isinstance(low, int) and isinstance(high, int) and 0 < low <= high else None


def _models(client: httpx.Client, base: str, model: str | None) -> tuple[dict[str, JsonMapping], Finding]:
    response = client.get(_joined(base, "/models"))
    base = base.partition("?")[0]
    if response.status_code in (401, 403):
        return {}, Finding.fail(
            "endpoint", f"{base} refuses the key ({response.status_code})", "give it as QVL_API_KEY"
        )
    if response.status_code != 200:
        return {}, Finding.fail(
            "endpoint",
            f"GET {base}/models answers {response.status_code}: {_error_text(response)}",
            "give the address that an OpenAI client would use, such as http://127.0.0.1:8000/v1",
        )
    models = {str(item["id"]): item for item in response.json()["data"]}
    names = [*models]
    if not names or (model and model not in names):
        return models, Finding.fail(
            "endpoint",
            f"{base} serves {', '.join(names) or 'no model'}" + (f", not {model}" if model else ""),
            "choose one with --model, or set --served-model-name on the server",
        )
    return models, Finding.ok("endpoint", f"{base} serves {', '.join(names)}", {"models": names})


def _capabilities(endpoint: EndpointClient, key: str | None) -> Iterator[Finding]:
    first = endpoint.ask(sample(), _QUESTION)
    if first.status != 200:
        yield Finding.fail(
            "endpoint-picture",
            f"a request with a picture gets {first.status}: {first.error}",
            "serve a vision model; the server's log says why it refused",
        )
        return
    blank = endpoint.ask(None, _QUESTION)
    if blank.status == 200 and 0 < first.prompt_tokens <= blank.prompt_tokens:
        yield Finding.fail(
            "endpoint-picture",
            "the picture adds no prompt tokens: the server ignores it",
            "serve a vision model, with its own chat template",
            {"with": first.prompt_tokens, "without": blank.prompt_tokens},
        )
        return
    yield Finding.ok("endpoint-picture", f"a picture is answered ({first.prompt_tokens} prompt tokens)")
    logprobs = _logprobs(endpoint)
    yield logprobs
    yield _schema(endpoint)
    yield _pixel_limit(endpoint, first, blank)
    yield from _probed(endpoint, key)


def _logprobs(endpoint: EndpointClient) -> Finding:
    answer = endpoint.ask(None, "Say yes.", logprobs=True)
    fix = "confidences cannot be computed from this endpoint; use one with logprobs, or accept confidence null"
    if answer.status != 200:
        return Finding.warn("endpoint-logprobs", f"logprobs are refused ({answer.status}): {answer.error}", fix)
    if not answer.logprobs:
        return Finding.warn("endpoint-logprobs", "logprobs were requested but not returned", fix)
    if not all(math.isfinite(value) and value <= 1e-6 for value in answer.logprobs):
        return Finding.fail("endpoint-logprobs", "logprobs are not log-probabilities", fix, {"got": answer.logprobs})
    return Finding.ok("endpoint-logprobs", f"logprobs for {len(answer.logprobs)} tokens")


def _probed(endpoint: EndpointClient, key: str | None) -> Iterator[Finding]:
    """Yield what the probes of `qvl parity` find, asked as the SDK asks."""
    # Servers without keys take any; one of the environment is not theirs.
    pipeline = AsyncPipeline(f"openai:{endpoint.model}", base_url=endpoint.base, api_key=key or "EMPTY", cache="off")
    side = LiveSide(pipeline, {"max_tokens": _TOKENS})
    with asyncio.Runner() as runner:
        try:
            runner.run(side.open())
            for probe in probes(endpoint.budget):
                yield from map(_finding, runner.run(probe("the endpoint", side)))
        except QvlError as exc:
            yield Finding.fail("endpoint-probes", exc.message, exc.hint or "the server's log says more")
        finally:
            runner.run(pipeline.aclose())


def _finding(one: Probed) -> Finding:
    check = f"endpoint-{one.subject}"
    if one.right is None:
        return Finding.skip(check, one.told)
    if one.right:
        return Finding.ok(check, one.told)
    if one.cause is None:
        return Finding.fail(check, one.told, "the server's log says more")
    return Finding.warn(check, f"{one.cause.title}: {one.told}", one.cause.remedy)


def _schema(endpoint: EndpointClient) -> Finding:
    response_format = {"type": "json_schema", "json_schema": {"name": "canary", "strict": True, "schema": _SCHEMA}}
    answer = endpoint.ask(None, "Say hello.", response_format=response_format, max_tokens=64)
    fix = "use a server with structured output (vLLM 0.12 or newer, qvl-serve); else answers are repaired"
    if answer.status != 200:
        return Finding.warn("endpoint-schema", f"json_schema is refused ({answer.status}): {answer.error}", fix)
    try:
        kept = json.loads(answer.text) == {"canary": "QVL-7F3A"}
    except ValueError:
        kept = False
    if kept:
        return Finding.ok("endpoint-schema", "json_schema is enforced")
    text = f"json_schema is accepted but ignored: {answer.text[:60]!r}"
    return Finding.fail("endpoint-schema", text, fix, {"text": answer.text})


def _pixel_limit(endpoint: EndpointClient, plain: ChatAnswer, blank: ChatAnswer) -> Finding:
    name = "endpoint-pixels"
    # Half of what the picture takes, since a limit above that changes nothing.
    half = max(8, plain.prompt_tokens - blank.prompt_tokens) // 2 * _TOKEN_PIXELS
    size = {"shortest_edge": min(4 * _TOKEN_PIXELS, half), "longest_edge": half}
    answer = endpoint.ask(sample(), _QUESTION, mm_processor_kwargs={"size": size})
    if answer.status != 200:
        return Finding.ok(name, f"a pixel limit per request is refused ({answer.status}); qvl resizes by itself")
    if not answer.prompt_tokens or answer.prompt_tokens < plain.prompt_tokens:
        return Finding.ok(name, "a pixel limit per request is honoured", {"prompt_tokens": answer.prompt_tokens})
    return Finding.warn(
        name,
        "a pixel limit per request (mm_processor_kwargs) is silently ignored",
        "resize before upload, as qvl does with max_pixels",
        {"prompt_tokens": answer.prompt_tokens},
    )


def _answer(body: JsonMapping) -> ChatAnswer:
    choice = body["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    usage = body.get("usage") or {}
    return ChatAnswer(
        200,
        text=choice["message"].get("content") or "",
        logprobs=tuple(float(entry["logprob"]) for entry in entries),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
    )


def _error_text(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:160] or response.reason_phrase
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return str(message or body)[:160]
