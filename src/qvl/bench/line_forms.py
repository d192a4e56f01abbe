"""The forms of one row of a benchmark's input.

| form of a row | comes from |
|---|---|
| `{"messages": [...]}`, a bare list of messages | OpenAI; `"images": [...]` beside it from training sets |
| `"text"`, `{"prompt"}`, `{"text"}`, `{"question"}`, `{"instruction", "input"}` | text alone |
| `{"prompt": ["a", "b"]}`, `["a", "b"]` | several prompts, each a request of its own |
| `{"image_path"}`, `{"image_url"}`, `{"image"}`, `{"images"}` with or without a text | product catalogues |
| `{"conversations": [{"from": "human", "value"}, …]}` | ShareGPT, LLaVA: the first question, as vLLM does |
| `{"prompt", "image_files"}`, `{"content": [...]}`, `{"prompt", "output_tokens"}` | vLLM's benchmark |
| `{"prompt", "prompt_tokens_count", "output_tokens_count"}` | guidellm |
| `{"custom_id", "method", "url", "body"}` | OpenAI's batch files, of the API that is loaded |
| `{"input": ...}`, with `questions` for decisions | whole requests, where that API is loaded |

`id` (or `custom_id`) names an item and `expected` is the right answer. A row with a text and a picture has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias, cast

from qvl.bench.apis import CHAT_FIELDS, BenchApi, NoRequestError
from qvl.types import JsonObject

TEXT_KEYS: Final = ("prompt", "text", "question", "query", "instruction")
PICTURE_KEYS: Final = ("image_path", "image_url", "image", "images", "image_files", "image_paths", "image_urls")
NOT_OURS: Final = frozenset({"model", "messages", "stream", "stream_options"})
_MARK: Final = "<image>"
# Of ShareGPT's turns and those who took up its form.
_SPEAKERS: Final[Mapping[str, str]] = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_LONGEST: Final = ("output_tokens", "output_tokens_count", "max_output_tokens")
# What stores of conversations keep beside a message, and endpoints refuse.
_LABELS: Final = frozenset({"id", "created", "created_at", "timestamp", "metadata", "model", "parent_id"})
Messages: TypeAlias = tuple[JsonObject, ...]
Form: TypeAlias = tuple[str | None, Messages, JsonObject, object]
"""(id, messages, params, expected), as in `Item`."""
_CHAT: Final = BenchApi()


def read_forms(value: object, prompt: str, media: Sequence[str] = PICTURE_KEYS, api: BenchApi = _CHAT) -> list[Form]:
    """Return the requests of `value`, a row as JSON values: one, or several where it lists prompts.

    `prompt` is the question for pictures without a text; `media` are the fields that may have them; `api` is asked.

    Raises:
        NoRequestError: the form of the row is unknown, or the API has none for it.
    """
    forms = _forms(value, prompt, media, api)
    for _, messages, params, _ in forms:
        api.body(messages, params)
    return forms


def _forms(value: object, prompt: str, media: Sequence[str], api: BenchApi) -> list[Form]:
    if _are_texts(value):
        return [_form(text, prompt, media, api) for text in cast("list[str]", value)]
    if isinstance(value, dict):
        key = next((key for key in TEXT_KEYS if value.get(key) is not None), "")
        texts = value.get(key)
        if key and _are_texts(texts):
            return [_form({**value, key: text}, prompt, media, api) for text in cast("list[str]", texts)]
        if key and isinstance(texts, list) and texts and isinstance(texts[0], dict):
            rest = {name: cell for name, cell in value.items() if name != key}
            return [_form({**rest, "messages" if "role" in texts[0] else "content": texts}, prompt, media, api)]
    return [_form(value, prompt, media, api)]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _form(value: object, prompt: str, media: Sequence[str], api: BenchApi) -> Form:
    if isinstance(value, str):
        value = {"prompt": value}
    if isinstance(value, list):
        return None, _messages(value), {}, None
    if not isinstance(value, dict):
        raise NoRequestError(f"a row must be an object, a text or a list of messages, not {type(value).__name__}")
    name = value.get("custom_id", value.get("id"))
    name = None if name is None else str(name)
    expected = value.get("expected")
    body = value.get("body")
    if isinstance(body, dict):
        url = str(value.get("url") or "/v1/chat/completions")
        if not url.endswith(f"/v1{api.path}"):
            raise NoRequestError(f"the line is for {url[:60]}; --target {api.name} loads /v1{api.path}")
        if api.name == "chat":
            params = {key: setting for key, setting in body.items() if key not in NOT_OURS}
            return name, _messages(body.get("messages")), params, expected
        return name, (), _whole(body), expected
    if api.input_field and value.get(api.input_field) is not None and not any(map(value.get, TEXT_KEYS)):
        return name, (), _whole(value), expected
    params = {key: value[key] for key in CHAT_FIELDS | api.fields if value.get(key) is not None}
    pictures = [source for key in media if value.get(key) is not None for source in _sources(value[key], key)]
    longest = next((value[key] for key in _LONGEST if value.get(key) is not None), None)
    if longest is not None and not {"max_tokens", "max_completion_tokens"} & params.keys():
        if not isinstance(longest, int | float) or longest < 1:
            raise NoRequestError(f"the longest answer must be a number of tokens, not {longest!r}")
        params["max_tokens"] = int(longest)
    talk = next((value[key] for key in ("conversations", "conversation") if value.get(key) is not None), None)
    if talk is not None:
        messages = _messages(_first_question(talk))
        return name, _illustrated(messages, pictures) if pictures else messages, params, expected
    if value.get("messages") is not None:
        messages = _messages(value["messages"])
        return name, _illustrated(messages, pictures) if pictures else messages, params, expected
    if isinstance(value.get("content"), list):
        return name, _messages([{"role": "user", "content": value["content"]}]), params, expected
    text = next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)
    if text is None and not pictures:
        raise NoRequestError(f"the object has no messages, text or picture, only: {', '.join(map(str, value))[:100]}")
    if text is not None and not isinstance(text, str):
        raise NoRequestError(f"the text must be a string, not {type(text).__name__}")
    if isinstance(value.get("instruction"), str) and text == value["instruction"] and value.get("input"):
        text = f"{text}\n{value['input']}"
    text = prompt if text is None else text.replace(_MARK, "").strip() if pictures else text
    return name, (user_message(text, pictures),), params, expected


def _whole(body: JsonObject) -> JsonObject:
    """Return a request of another API than chat, without what the run itself says."""
    ours = {"model", "stream", "stream_options", "id", "custom_id", "expected"}
    return {key: setting for key, setting in body.items() if key not in ours}


def _first_question(talk: object) -> list[object]:
    """Return the system turn and the first user turn of a ShareGPT conversation, in OpenAI's form."""
    if isinstance(talk, list) and len(talk) == 1 and isinstance(talk[0], list):
        talk = talk[0]  # as in VisionArena
    if not isinstance(talk, list):
        raise NoRequestError(f"conversations must be a list of turns, not {type(talk).__name__}")
    system: list[object] = []
    for turn in talk:
        if not isinstance(turn, dict):
            raise NoRequestError("a turn of conversations must be an object")
        speaker = turn.get("from", turn.get("role"))
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise NoRequestError(f"unknown speaker {str(speaker)[:40]!r} in conversations")
        message = {"role": role, "content": turn.get("value", turn.get("content"))}
        if role == "user":
            return [*system, message]
        if role == "system":
            system = [message]
    raise NoRequestError("conversations have no turn of a user")


def user_message(text: str, pictures: Sequence[str]) -> JsonObject:
    if not pictures:
        return {"role": "user", "content": text}
    parts = [_picture(source) for source in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _picture(source: str, **more: object) -> JsonObject:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def _sources(value: object, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    sources = [_source(source) for source in values]
    names = [source for source in sources if isinstance(source, str)]
    if len(names) < len(sources):
        raise NoRequestError(f"{key} must be a picture name or a list of them")
    return names


def _source(source: object) -> object:
    """Return the name of a picture; one that is in the row itself is written to a file first."""
    held, name = (
        (source.get("bytes"), source.get("url", source.get("path"))) if isinstance(source, dict) else (source, "")
    )
    if isinstance(held, bytes):
        from qvl.evaluation.label_arrow import embedded

        return embedded(held, str(name or ""))
    return name if isinstance(source, dict) else source


def _illustrated(messages: Messages, pictures: list[str]) -> Messages:
    """Return `messages` with `pictures` in place of `<image>` marks, else in the first user message."""
    unplaced = list(pictures)
    question = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    made = []
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        marked: list[JsonObject] = []
        for part in parts:
            texts = part["text"].split(_MARK) if part.get("type") == "text" else []
            if len(texts) < 2:
                marked.append(part)
                continue
            for before, text in enumerate(texts):
                if before and unplaced:
                    marked.append(_picture(unplaced.pop(0)))
                if text:
                    marked.append({"type": "text", "text": text})
        made.append(message if marked == parts and index != question else {**message, "content": marked})
    if unplaced:
        made[question] = {**made[question], "content": [*map(_picture, unplaced), *made[question]["content"]]}
    return tuple(made)


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise NoRequestError("messages must be a non-empty list")
    made = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NoRequestError("a message must be an object with a role")
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part) for part in content]
        elif content is not None and not isinstance(content, str):
            raise NoRequestError(f"content must be a string or a list, not {type(content).__name__}")
        kept = {key: setting for key, setting in message.items() if key not in _LABELS}
        made.append({**kept, "content": content})
    return tuple(made)


def _part(part: object) -> JsonObject:
    """Return a content part in OpenAI's chat format; Qwen's and the Responses API's formats are converted."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise NoRequestError("a content part must be an object or a string")
    kind = part.get("type") or next((key for key in ("text", "image", "image_url") if key in part), None)
    if kind in ("text", "input_text"):
        if not isinstance(part.get("text"), str):
            raise NoRequestError("a text part has no text")
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "image", "input_image"):
        source = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
        more = {}
        if isinstance(source, dict):
            more = {key: value for key, value in source.items() if key not in ("url", "path")}
            source = source.get("url", source.get("path"))
        if not isinstance(source, str):
            raise NoRequestError("a picture part has no picture")
        return _picture(source, **more)
    if kind is None:
        raise NoRequestError("a content part has no type")
    return part
