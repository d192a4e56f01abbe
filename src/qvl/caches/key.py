"""The cache key: the hash of a manifest of everything that changes an answer.

A key that leaves something out returns the answer to another request; a key that includes too much never hits. So
the manifest is explicit, stored with the entry, and two of them can be compared (`explain`). Settings that do not
change the answer (timeouts, retries, progress) are not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Final, NotRequired, TypeAlias, TypedDict

from qvl.errors import CacheError, RequestError
from qvl.sampling import PARAMETERS, SamplingParams
from qvl.types import (
    ChatRequest,
    Choice,
    JsonMapping,
    JsonObject,
    MediaPart,
    Message,
    PromptFacts,
    Result,
    TextPart,
    Timing,
    TokenLogprob,
    ToolCall,
    Usage,
    VideoPart,
    canonical_json,
    map_parts,
)

MANIFEST_VERSION: Final = 1
# Token, logprob, bytes as hex, and its alternatives in the same form.
StoredLogprob: TypeAlias = "tuple[str, float, str, list[StoredLogprob]]"


class TextManifest(TypedDict):
    """A text part in a manifest."""

    text: str


class PictureManifest(TypedDict):
    """A picture in a manifest: its hash and canonical size; `sized` only where a request set the size."""

    image: str
    size: list[int]
    sized: NotRequired[bool]


class VideoManifest(TypedDict):
    """A video in a manifest: its hash, the size of its frames, and the times of those that are shown."""

    video: str
    size: list[int]
    times: list[float]
    sized: NotRequired[bool]


PartManifest: TypeAlias = TextManifest | PictureManifest | VideoManifest


class MessageManifest(TypedDict):
    """A message in a manifest, its parts in their order; `reasoning` only where there is one."""

    role: str
    parts: list[PartManifest]
    tool_calls: list[JsonObject]
    tool_call_id: str | None
    name: str | None
    reasoning: NotRequired[str]


class FormatManifest(TypedDict):
    """The response format in a manifest, the JSON whose hash is the cache key."""

    kind: str
    schema: JsonObject | None
    pattern: str | None
    choices: list[str]


class Manifest(TypedDict):
    """Everything that changes an answer, as JSON values."""

    v: int
    task: str
    prompt_version: str
    language: str
    namespace: str
    backend: JsonObject
    max_pixels: int
    messages: list[MessageManifest]
    sampling: JsonObject
    response_format: FormatManifest
    tools: list[JsonObject]
    tool_choice: str
    parallel_tool_calls: bool
    extra: JsonObject
    chat_template_kwargs: NotRequired[JsonObject]
    add_generation_prompt: NotRequired[bool]
    continue_final_message: NotRequired[bool]
    reasoning_effort: NotRequired[str]
    prompt: NotRequired[str | list[int]]
    cache_salt: NotRequired[str]
    prefill: NotRequired[list[int]]
    video_form: NotRequired[str]


def build_manifest(
    request: ChatRequest,
    *,
    identity: JsonMapping,
    max_pixels: int,
    task: str = "chat",
    prompt_version: str = "",
    language: str = "",
    namespace: str = "",
    video_form: str = "",
) -> Manifest:
    """Return everything that changes the answer to `request`.

    Pictures are represented by hash and canonical size, videos by hash and times of frames,
    in the order of their message's parts, so order, role,
    position and detail are part of the key. `max_pixels` is the media gate's budget; a smaller one in the request wins.
    `task`, `prompt_version` and `language` are those of an analysis; `namespace` separates tenants; `video_form` is how
    the videos reach the model, "" in its own form.
    """
    return {
        "v": MANIFEST_VERSION,
        "task": task,
        "prompt_version": prompt_version,
        "language": language,
        "namespace": namespace,
        "backend": dict(identity),
        "max_pixels": min(max_pixels, request.max_pixels or max_pixels),
        "messages": [_message(message) for message in request.messages],
        "sampling": _sampling(request.sampling),
        "response_format": _response_format(request),
        "tools": [asdict(tool) for tool in request.tools],
        "tool_choice": request.tool_choice if request.tools else "none",
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else True,
        "extra": dict(request.extra),
        # What most requests leave alone is named only where it says something, so that their keys stay.
        **request.prompt_fields(),  # type: ignore[typeddict-item]
        **({"cache_salt": request.cache_salt} if request.cache_salt else {}),
        **({"prefill": list(request.prefill)} if request.prefill else {}),
        **({"video_form": video_form} if video_form else {}),
    }


def hash_manifest(manifest: Mapping[str, object]) -> str:
    """Return the key: `sha256-` and the hex digest of the manifest's canonical JSON.

    Raises:
        RequestError: it contains values that are not valid JSON or Unicode.
    """
    try:
        text = canonical_json(manifest).encode()
    except UnicodeEncodeError as exc:
        raise RequestError("a text of the request is not valid Unicode", hint="it holds half a surrogate pair") from exc
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"the request has no cache key: {exc}", hint="pass only JSON values") from exc
    return "sha256-" + hashlib.sha256(text).hexdigest()


def explain(a: JsonMapping, b: JsonMapping) -> list[tuple[str, object, object]]:
    """Return the fields in which two manifests differ: (dotted path, value in a, value in b). Missing is None."""
    return list(_differences("", a, b))


def _differences(path: str, a: object, b: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(f"{path}.{name}" if path else name, a.get(name), b.get(name))
    elif isinstance(a, list) and isinstance(b, list):
        for i in range(max(len(a), len(b))):
            yield from _differences(f"{path}[{i}]", a[i] if i < len(a) else None, b[i] if i < len(b) else None)
    elif a != b:
        yield path, a, b


def _message(message: Message) -> MessageManifest:
    manifest: MessageManifest = {
        "role": message.role,
        "parts": map_parts(message.parts, _text, _media),
        "tool_calls": [asdict(call) for call in message.tool_calls],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    if message.reasoning:
        manifest["reasoning"] = message.reasoning
    return manifest


def _text(part: TextPart) -> PartManifest:
    return {"text": part.text}


def _media(part: MediaPart) -> PartManifest:
    if isinstance(part, VideoPart):
        video = part.video
        shown: VideoManifest = {"video": video.sha256, "size": [video.width, video.height], "times": list(video.times)}
        if video.frames[0].sized:
            shown["sized"] = True
        return shown
    picture = part.picture
    entry: PictureManifest = {"image": picture.sha256, "size": [picture.width, picture.height]}
    # Named only where a request set the size, which the model then leaves as it is.
    if picture.sized:
        entry["sized"] = True
    return entry


def _sampling(params: SamplingParams) -> JsonObject:
    """Return every parameter that each backend has, and of the others those that differ from their defaults."""
    assumed = {name: getattr(params, name) for name, known in PARAMETERS.items() if not known.declared}
    return assumed | params.changed()


def _response_format(request: ChatRequest) -> FormatManifest:
    form = request.response_format
    return {
        "kind": form.kind,
        "schema": dict(form.schema) if form.schema is not None else None,
        "pattern": form.pattern,
        "choices": list(form.choices),
    }


def result_to_json(result: Result) -> JsonObject:
    """Return a Result as JSON for the cache: everything but pictures, request id and cache state."""
    return {
        "choices": [_choice_to_json(choice) for choice in result.choices],
        "usage": asdict(result.usage),
        "timing": asdict(result.timing),
        "model": result.model,
        "backend": result.backend,
        "created_at": result.created_at,
        "notes": list(result.notes),
        **({"prompt": _prompt_to_json(result.prompt)} if result.prompt is not None else {}),
    }


def result_from_json(data: JsonMapping) -> Result:
    """Return the Result of JSON written by `result_to_json`.

    Raises:
        CacheError: `data` is not such JSON.
    """
    try:
        return Result(
            choices=tuple(_choice_from_json(choice) for choice in data["choices"]),
            usage=Usage(**data["usage"]),
            timing=Timing(**data["timing"]),
            model=data["model"],
            backend=data["backend"],
            created_at=data["created_at"],
            notes=tuple(data["notes"]),
            prompt=_prompt_from_json(data["prompt"]) if "prompt" in data else None,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise CacheError(f"the cached answer cannot be read: {exc}") from exc


def _choice_to_json(choice: Choice) -> JsonObject:
    return {
        "index": choice.index,
        "text": choice.text,
        "reasoning": choice.reasoning,
        "finish_reason": choice.finish_reason,
        "tool_calls": [asdict(call) for call in choice.tool_calls],
        "logprobs": None if choice.logprobs is None else [_logprob_to_json(item) for item in choice.logprobs],
        **({"token_ids": list(choice.token_ids)} if choice.token_ids else {}),
        **({"stop_string": choice.stop_string} if choice.stop_string is not None else {}),
    }


def _choice_from_json(data: JsonMapping) -> Choice:
    logprobs = data["logprobs"]
    return Choice(
        index=data["index"],
        text=data["text"],
        reasoning=data["reasoning"],
        finish_reason=data["finish_reason"],
        tool_calls=tuple(ToolCall(**call) for call in data["tool_calls"]),
        logprobs=None if logprobs is None else tuple(_logprob_from_json(item) for item in logprobs),
        token_ids=tuple(data.get("token_ids", ())),
        stop_string=data.get("stop_string"),
    )


def _prompt_to_json(prompt: PromptFacts) -> JsonObject:
    logprobs = [None if item is None else [*_logprob_to_json(item), item.id, item.rank] for item in prompt.logprobs]
    tops = [[] if item is None else [[top.id, top.rank] for top in item.top] for item in prompt.logprobs]
    return {"token_ids": list(prompt.token_ids), "text": prompt.text, "logprobs": logprobs, "tops": tops}


def _prompt_from_json(data: JsonMapping) -> PromptFacts:
    logprobs: list[TokenLogprob | None] = []
    for stored, tops in zip(data["logprobs"], data["tops"], strict=True):
        item = None if stored is None else _logprob_from_json(stored[:4])
        if item is not None:
            top = tuple(replace(one, id=ids[0], rank=ids[1]) for one, ids in zip(item.top, tops, strict=True))
            item = replace(item, id=stored[4], rank=stored[5], top=top)
        logprobs.append(item)
    return PromptFacts(tuple(data["token_ids"]), data["text"], tuple(logprobs))


def _logprob_to_json(item: TokenLogprob) -> StoredLogprob:
    return item.token, item.logprob, item.bytes.hex(), [_logprob_to_json(top) for top in item.top]


def _logprob_from_json(data: StoredLogprob) -> TokenLogprob:
    token, logprob, raw, top = data
    return TokenLogprob(token, logprob, bytes.fromhex(raw), tuple(_logprob_from_json(item) for item in top))
