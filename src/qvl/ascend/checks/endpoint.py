"""Checks of an OpenAI-compatible endpoint: models, picture decoding, schemas, logprobs.

The tests of EXIF rotation and alpha need no knowledge of the model: they compare its answer about the test picture
with its answers about the correctly and the incorrectly decoded pixels.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.ascend.report import Finding
from qvl.parity.stored import sample, transparent_picture, turned_picture

if TYPE_CHECKING:
    import httpx
    from PIL import Image

    from qvl.parity.stored import StoredPicture
    from qvl.types import JsonMapping, JsonObject

_TIMEOUT = 120.0
_QUESTION = "What brand is printed in this picture? Answer with the brand."
# 64 picture tokens of 32 x 32 pixels at most; the sample takes 140.
_SMALL = {"shortest_edge": 4096, "longest_edge": 65536}
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
    """A client that sends test requests to one base URL and model."""

    client: httpx.Client
    base: str
    model: str

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
                endpoint = EndpointClient(client, base, model or models[0])
                yield from _capabilities(endpoint)
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


def nearer(stored: ChatAnswer, right: ChatAnswer, wrong: ChatAnswer) -> bool | None:
    """True if `stored` is closer to the answer for correct decoding than to that for wrong; None if undecidable."""
    if right.text != wrong.text:
        if stored.text == right.text:
            return True
        if stored.text == wrong.text:
            return False
    to_right, to_wrong = _distance(stored, right), _distance(stored, wrong)
    if to_right is None or to_wrong is None or math.isclose(to_right, to_wrong, abs_tol=1e-3):
        return None
    return to_right < to_wrong


def _models(client: httpx.Client, base: str, model: str | None) -> tuple[list[str], Finding]:
    response = client.get(_joined(base, "/models"))
    base = base.partition("?")[0]
    if response.status_code in (401, 403):
        return [], Finding.fail(
            "endpoint", f"{base} refuses the key ({response.status_code})", "give it as QVL_API_KEY"
        )
    if response.status_code != 200:
        return [], Finding.fail(
            "endpoint",
            f"GET {base}/models answers {response.status_code}: {_error_text(response)}",
            "give the address that an OpenAI client would use, such as http://127.0.0.1:8000/v1",
        )
    names = [str(item["id"]) for item in response.json()["data"]]
    if not names or (model and model not in names):
        return names, Finding.fail(
            "endpoint",
            f"{base} serves {', '.join(names) or 'no model'}" + (f", not {model}" if model else ""),
            "choose one with --model, or set --served-model-name on the server",
        )
    return names, Finding.ok("endpoint", f"{base} serves {', '.join(names)}", {"models": names})


def _capabilities(endpoint: EndpointClient) -> Iterator[Finding]:
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
    extra: Mapping[str, object] = {"logprobs": True} if logprobs.status == "ok" else {}
    yield _decoding(endpoint, "endpoint-exif", turned_picture(), extra)
    yield _decoding(endpoint, "endpoint-alpha", transparent_picture(), extra)
    yield _schema(endpoint)
    yield _pixel_limit(endpoint, first)


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


def _decoding(endpoint: EndpointClient, name: str, picture: StoredPicture, extra: Mapping[str, object]) -> Finding:
    subject, rule = ("EXIF orientation", "applied") if name == "endpoint-exif" else ("transparency", "put on white")
    stored, right = (endpoint.ask(one, _QUESTION, **extra) for one in (picture.stored, picture.right))
    wrong = {told: endpoint.ask(one, _QUESTION, **extra) for told, one in picture.wrong.items()}
    fix = "let qvl decode: pictures sent through a Pipeline or qvl-serve arrive upright and without alpha"
    refused = next((answer for answer in (stored, right, *wrong.values()) if answer.status != 200), None)
    if refused is not None:
        return Finding.fail(name, f"{subject}: the picture gets {refused.status}: {refused.error}", fix)
    detail = {"stored": stored.text, "right": right.text, **{told: answer.text for told, answer in wrong.items()}}
    verdicts = {told: nearer(stored, right, answer) for told, answer in wrong.items()}
    seen = [told for told, verdict in verdicts.items() if verdict is False]
    if seen:
        # The last that is nearer than those before it: a picture that is read wrongly may be near to several.
        nearest = seen[0]
        for told in seen[1:]:
            nearest = nearest if nearer(stored, wrong[nearest], wrong[told]) else told
        what = f"{subject} is ignored: a picture is read {nearest}, so the model sees other pixels than a person"
        return Finding.warn(name, what, fix, detail)
    if None in verdicts.values():
        return Finding.skip(name, f"{subject}: inconclusive from this model's answers", detail)
    return Finding.ok(name, f"{subject} is {rule}", detail)


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


def _pixel_limit(endpoint: EndpointClient, plain: ChatAnswer) -> Finding:
    name = "endpoint-pixels"
    answer = endpoint.ask(sample(), _QUESTION, mm_processor_kwargs={"size": _SMALL})
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


def _distance(a: ChatAnswer, b: ChatAnswer) -> float | None:
    pairs = list(zip(a.logprobs, b.logprobs, strict=False))
    if not pairs:
        return None
    gap = sum(abs(left - right) for left, right in pairs) / len(pairs)
    return gap + (1.0 if a.text != b.text else 0.0)


def _error_text(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:160] or response.reason_phrase
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return str(message or body)[:160]
