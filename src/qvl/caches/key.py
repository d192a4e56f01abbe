"""The cache key: a manifest of everything that changes an answer, and its hash.

A key that leaves something out returns somebody else's answer; a key that takes too much in never hits. So the
manifest is spelt out, kept beside the entry, and two of them can be compared (`explain`). What a client may turn
without changing the answer (timeouts, retries, progress) is not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import CacheError, RequestError
from qvl.sampling import PARAMETERS
from qvl.types import (
    ChatRequest,
    Choice,
    ImagePart,
    Message,
    Result,
    Timing,
    TokenLogprob,
    ToolCall,
    Usage,
    canonical_json,
)

if TYPE_CHECKING:
    from qvl.media.picture import Picture

Manifest = Mapping[str, Any]
MANIFEST_VERSION: Final = 1


def build_manifest(
    request: ChatRequest,
    *,
    identity: Mapping[str, Any],
    max_pixels: int,
    task: str = "chat",
    prompt_version: str = "",
    language: str = "",
    namespace: str = "",
) -> dict[str, Any]:
    """Everything that changes the answer to `request`, as JSON values.

    Pictures stand by their hash and canonical size at their place in their message, so order, role, position and
    detail are part of the key.
    `max_pixels` is the media gate's budget; a smaller one in the request wins.
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
        "sampling": {name: getattr(request.sampling, name) for name in PARAMETERS},
        "response_format": _response_format(request),
        "tools": [asdict(tool) for tool in request.tools],
        "tool_choice": request.tool_choice if request.tools else "none",
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else True,
        "extra": dict(request.extra),
    }


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """The key: `sha256-` and the hex digest of the manifest's canonical JSON.

    Raises:
        RequestError: it holds what JSON or Unicode cannot carry.
    """
    try:
        text = canonical_json(manifest).encode()
    except UnicodeEncodeError as exc:
        raise RequestError("a text of the request is not valid Unicode", hint="it holds half a surrogate pair") from exc
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"the request has no cache key: {exc}", hint="pass only JSON values") from exc
    return "sha256-" + hashlib.sha256(text).hexdigest()


def explain(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The fields in which two manifests differ: (dotted path, value in a, value in b). Missing is None."""
    return list(_differences("", a, b))


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(f"{path}.{name}" if path else name, a.get(name), b.get(name))
    elif isinstance(a, list) and isinstance(b, list):
        for i in range(max(len(a), len(b))):
            yield from _differences(f"{path}[{i}]", a[i] if i < len(a) else None, b[i] if i < len(b) else None)
    elif a != b:
        yield path, a, b


def _message(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "parts": [
            _picture(part.picture) if isinstance(part, ImagePart) else {"text": part.text} for part in message.parts
        ],
        "tool_calls": [asdict(call) for call in message.tool_calls],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }


def _picture(picture: Picture) -> dict[str, Any]:
    size = {"image": picture.sha256, "size": [picture.width, picture.height]}
    # Named only where a request set the size, which the model then leaves as it is.
    return {**size, "sized": True} if picture.sized else size


def _response_format(request: ChatRequest) -> dict[str, Any]:
    wanted = request.response_format
    return {
        "kind": wanted.kind,
        "schema": dict(wanted.schema) if wanted.schema is not None else None,
        "pattern": wanted.pattern,
        "choices": list(wanted.choices),
    }


def result_to_json(result: Result) -> dict[str, Any]:
    """What the cache keeps of a Result: everything but pictures, request id and cache state."""
    return {
        "choices": [_choice_to_json(choice) for choice in result.choices],
        "usage": asdict(result.usage),
        "timing": asdict(result.timing),
        "model": result.model,
        "backend": result.backend,
        "created_at": result.created_at,
        "notes": list(result.notes),
    }


def result_from_json(data: Mapping[str, Any]) -> Result:
    """Reads what `result_to_json` wrote.

    Raises:
        CacheError: it is something else.
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
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise CacheError(f"the cached answer cannot be read: {exc}") from exc


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "reasoning": choice.reasoning,
        "finish_reason": choice.finish_reason,
        "tool_calls": [asdict(call) for call in choice.tool_calls],
        "logprobs": None if choice.logprobs is None else [_logprob_to_json(item) for item in choice.logprobs],
    }


def _choice_from_json(data: Mapping[str, Any]) -> Choice:
    logprobs = data["logprobs"]
    return Choice(
        index=data["index"],
        text=data["text"],
        reasoning=data["reasoning"],
        finish_reason=data["finish_reason"],
        tool_calls=tuple(ToolCall(**call) for call in data["tool_calls"]),
        logprobs=None if logprobs is None else tuple(_logprob_from_json(item) for item in logprobs),
    )


def _logprob_to_json(item: TokenLogprob) -> list[Any]:
    return [item.token, item.logprob, item.bytes.hex(), [_logprob_to_json(top) for top in item.top]]


def _logprob_from_json(data: list[Any]) -> TokenLogprob:
    token, logprob, raw, top = data
    return TokenLogprob(token, logprob, bytes.fromhex(raw), tuple(_logprob_from_json(item) for item in top))
