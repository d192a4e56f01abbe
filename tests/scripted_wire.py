"""The server's side of the wire for `ScriptedEndpoint`: OpenAI JSON in, events of the echo out."""

from __future__ import annotations

import base64
import io
from collections.abc import Set
from dataclasses import dataclass

from qvl.testing import echo
from qvl.types import JsonMapping, JsonObject, TokenLogprob


@dataclass(frozen=True, slots=True)
class Made:
    """An answer as stream events and as one whole body."""

    events: list[JsonObject]
    whole: JsonObject


def asked_in(body: JsonMapping, ignores: Set[str] = frozenset()) -> echo.EchoRequest:
    """A chat completion body as the echo understands it, without the fields that are ignored."""
    body = {name: value for name, value in body.items() if name not in ignores}
    messages = body.get("messages") or [{}]
    asked = next((m for m in reversed(messages) if m.get("role") == "user"), messages[-1])
    pictures = () if "image_url" in ignores else tuple(seen for m in messages for seen in _pictures(m.get("content")))
    form = body.get("response_format") or {}
    choice = body.get("tool_choice", "auto")
    tools = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in body.get("tools") or ()}
    stop = body.get("stop") or ()
    return echo.EchoRequest(
        question=_text(asked.get("content")),
        history=" ".join(_text(m.get("content")) for m in messages if m is not asked),
        pictures=pictures,
        temperature=body.get("temperature", 1.0),
        narrow=body.get("top_k") == 1 or body.get("min_p") == 1.0,
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(body.get("ignore_eos")),
        seed=body.get("seed"),
        logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
        n=body.get("n") or 1,
        schema=(form.get("json_schema") or {}).get("schema"),
        json_object=form.get("type") == "json_object",
        choices=tuple((body.get("structured_outputs") or {}).get("choice") or ()),
        tools=tuple(tools),
        tool_schemas=tools,
        tool_choice=choice if isinstance(choice, str) else choice["function"]["name"],
    )


def echo_events(body: JsonMapping, *, ignores: Set[str] = frozenset()) -> Made:
    """The echo's answer to a chat completion body."""
    asked = asked_in(body, ignores)
    said = echo.answer(asked)
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body.get("model")}
    events: list[JsonObject] = []
    whole: list[JsonObject] = []
    for index, choice in enumerate(said):
        notes = [_note(item) for item in echo.logprobs_of(choice.tokens, asked.logprobs or 0)]
        message: JsonObject = {"role": "assistant", "content": "".join(choice.tokens)}
        events.append({**frame, "choices": [_piece(index, {"role": "assistant", "content": ""})]})
        if choice.call is not None:
            name, arguments = choice.call
            call = {"index": 0, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
            message["tool_calls"] = [{**call, "function": {"name": name, "arguments": arguments}}]
            events.append({**frame, "choices": [_piece(index, {"tool_calls": [call]})]})
            rest = {"index": 0, "function": {"arguments": arguments}}
            events.append({**frame, "choices": [_piece(index, {"tool_calls": [rest]})]})
        for token, note in zip(choice.tokens, notes, strict=True):
            piece = _piece(index, {"content": token})
            if asked.logprobs is not None:
                piece["logprobs"] = {"content": [note]}
            events.append({**frame, "choices": [piece]})
        events.append({**frame, "choices": [{**_piece(index, {}), "finish_reason": choice.finish}]})
        whole.append(
            {
                "index": index,
                "message": message,
                "finish_reason": choice.finish,
                "logprobs": {"content": notes} if asked.logprobs is not None else None,
            }
        )
    completion = sum(choice.completion_tokens for choice in said)
    usage = {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": asked.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": asked.image_tokens},
    }
    if (body.get("stream_options") or {}).get("include_usage") and "stream_options" not in ignores:
        events.append({**frame, "choices": [], "usage": usage})
    return Made(events, {**frame, "object": "chat.completion", "choices": whole, "usage": usage})


def _piece(index: int, delta: JsonMapping) -> JsonObject:
    return {"index": index, "delta": delta, "finish_reason": None}


def _note(item: TokenLogprob) -> JsonObject:
    return {
        "token": item.token,
        "logprob": item.logprob,
        "bytes": list(item.bytes),
        "top_logprobs": [{"token": t.token, "logprob": t.logprob, "bytes": list(t.bytes)} for t in item.top],
    }


def _text(content: str | list[JsonObject] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or () if part.get("type") == "text")


def _pictures(content: object) -> list[echo.PictureFacts]:
    if not isinstance(content, list):
        return []
    from PIL import Image

    seen = []
    for part in content:
        if part.get("type") == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            with Image.open(io.BytesIO(data)) as image:
                seen.append(echo.PictureFacts(echo.colour_name(image), image.width, image.height))
    return seen
