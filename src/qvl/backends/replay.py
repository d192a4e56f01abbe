"""Records the answers of a backend and replays them, for tests and demonstrations without a model.

A recording is a file of JSON lines: a header about the backend, then one exchange a line. Pictures are represented by
their hash, so a recording is small and contains no picture.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Final, NotRequired, TypeAlias, TypedDict, cast

from qvl import errors
from qvl.backends.base import Backend, Capabilities
from qvl.backends.wrapper import WrappingBackend
from qvl.caches.key import build_manifest, explain, hash_manifest
from qvl.errors import BackendResponseError, BackendUnavailableError, ConfigError, QvlError, write_failed
from qvl.http.sse import shorten
from qvl.types import (
    ChatRequest,
    Chunk,
    FinishReason,
    JsonMapping,
    JsonObject,
    Timing,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

VERSION: Final = 1
_NO_BUDGET: Final = 2**62

RecordedLogprob: TypeAlias = "tuple[str, float, str, list[RecordedLogprob]]"
"""Token, logprob, bytes as hexadecimal digits, and the alternatives."""
RecordedError = TypedDict(
    "RecordedError", {"class": str, "message": str, "hint": str | None, "param": str | None, "code": str}
)


class RecordedChunk(TypedDict, total=False):
    """A Chunk as JSON, without empty fields."""

    text: str
    index: int
    reasoning: str
    tool_calls: list[JsonObject]
    logprobs: list[RecordedLogprob]
    finish_reason: FinishReason
    usage: JsonObject


class RecordedAnswer(TypedDict):
    """One answer: its chunks, and the error that ended it."""

    chunks: list[RecordedChunk]
    error: NotRequired[RecordedError]


class RecordingHeader(TypedDict):
    """The first line of a recording."""

    qvl_recording: int
    backend: str
    model: str
    identity: JsonObject
    capabilities: JsonObject


def request_manifest(request: ChatRequest) -> JsonObject:
    """Return the JSON that identifies a request: the cache key's manifest without backend, task and namespace."""
    # Who records does not know what a name stands for; in a cache key it is the adapter itself.
    named = {"adapter": request.adapter} if request.adapter else {}
    manifest = build_manifest(request, identity={}, max_pixels=_NO_BUDGET)
    others = {"v", "backend", "task", "prompt_version", "language", "namespace"}
    return {name: value for name, value in manifest.items() if name not in others} | named


@dataclass(slots=True)
class RecordedExchange:
    """A recorded request and its answers."""

    request: JsonMapping
    answers: list[RecordedAnswer] = field(default_factory=list)
    next_index: int = 0

    def next_answer(self) -> RecordedAnswer:
        """Return the next answer in recorded order; after the last one, that one again."""
        answer = self.answers[min(self.next_index, len(self.answers) - 1)]
        self.next_index += 1
        return answer


class RecordBackend(WrappingBackend):
    """Passes requests to `inner` and appends each request and answer to `path`.

    Errors are recorded too; answers that were not read to their end are not.

    Args:
        inner: the backend to record; opened and closed with this one.
        path: the file; a recording of the same backend is continued.
    """

    def __init__(self, inner: Backend, path: str | PathLike[str]) -> None:
        super().__init__(inner)
        self.path = Path(path)
        self._lock = threading.Lock()
        self._is_open = False

    async def open(self) -> None:
        """Open the inner backend and the file.

        Raises:
            ConfigError: the file records another backend, is not a recording, or cannot be written.
        """
        await super().open()
        await asyncio.to_thread(self._begin)
        self._is_open = True

    async def aclose(self) -> None:
        self._is_open = False
        await super().aclose()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        chunks: list[RecordedChunk] = []
        whole = False
        try:
            async with aclosing(self.inner.stream(request)) as stream:
                async for chunk in stream:
                    chunks.append(chunk_to_json(chunk))
                    whole = whole or chunk.usage is not None
                    yield chunk
        except QvlError as error:
            # An error because we were closed is not an answer of the backend.
            if self._is_open:
                await asyncio.to_thread(self._append, request, {"chunks": chunks, "error": error_to_json(error)})
            raise
        if whole:
            await asyncio.to_thread(self._append, request, {"chunks": chunks})

    def _begin(self) -> None:
        header: RecordingHeader = {
            "qvl_recording": VERSION,
            "backend": self.inner.name,
            "model": self.inner.model,
            "identity": self.inner.identity(),
            "capabilities": capabilities_to_json(self.inner.capabilities),
        }
        try:
            if self.path.exists() and self.path.stat().st_size:
                before = read_header(self.path)
                if before.get("identity") != header["identity"]:
                    raise ConfigError(f"{self.path} records another backend", hint="record to another file")
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(header)
        except OSError as exc:
            raise write_failed(f"the recording {self.path}", exc) from exc

    def _append(self, request: ChatRequest, answer: RecordedAnswer) -> None:
        manifest = request_manifest(request)
        try:
            self._write({"key": hash_manifest(manifest), "request": manifest, **answer})
        except OSError as exc:
            raise write_failed(f"the recording {self.path}", exc) from exc

    def _write(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class ReplayBackend(Backend):
    """Answers from a recording. Name, model, capabilities and identity are the recorded backend's.

    A request that was recorded several times gets its answers in recorded order, then the last one again.

    Args:
        model: the path of the recording, so that `Pipeline("replay:file.jsonl")` works.
    """

    name = "replay"
    shareable = True
    wants_pixels = False

    def __init__(self, model: str | PathLike[str]) -> None:
        self.path = Path(model)
        self.model = self.path.stem
        self._exchanges: dict[str, RecordedExchange] = {}
        self._capabilities = Capabilities()
        self._identity: JsonObject = {}
        self._closed: asyncio.Event | None = None
        self._running = 0

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def identity(self) -> JsonObject:
        return dict(self._identity)

    async def open(self) -> None:
        """Read the recording.

        Raises:
            ConfigError: the file does not exist, or it is not a recording.
        """
        if self._closed is not None and not self._closed.is_set():
            return
        header, self._exchanges = await asyncio.to_thread(read_recording, self.path)
        self.name, self.model = header["backend"], header["model"]
        self._identity = header["identity"]
        self._capabilities = capabilities_from_json(header["capabilities"])
        self._closed = asyncio.Event()

    async def aclose(self) -> None:
        if self._closed is not None:
            self._closed.set()

    def stats(self) -> Mapping[str, float]:
        return {"num_running": self._running, "num_waiting": 0, "recorded_requests": len(self._exchanges)}

    def unready(self) -> str | None:
        return "not open" if self._closed is None or self._closed.is_set() else None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the recorded answer.

        Raises:
            BackendResponseError: this request was not recorded; the message names the most similar one.
            QvlError: the error that was recorded instead of an answer.
        """
        closed = self._closed
        if closed is None or closed.is_set():
            raise BackendUnavailableError(f"the recording {self.path} is not open", hint="await backend.open()")
        manifest = request_manifest(request)
        exchange = self._exchanges.get(hash_manifest(manifest))
        if exchange is None:
            self.refuse_unsupported(request)
            raise self._unrecorded(manifest)
        answer = exchange.next_answer()
        self._running += 1
        try:
            for chunk in answer["chunks"]:
                await asyncio.sleep(0)
                if closed.is_set():
                    raise BackendUnavailableError(f"the recording {self.path} was closed while it was read")
                yield chunk_from_json(chunk)
            if "error" in answer:
                raise error_from_json(answer["error"])
        finally:
            self._running -= 1

    def _unrecorded(self, manifest: JsonMapping) -> QvlError:
        spelt = _spelt(manifest)
        ranked = sorted(
            self._exchanges.values(),
            key=lambda exchange: difflib.SequenceMatcher(None, _spelt(exchange.request), spelt).ratio(),
        )
        if not ranked:
            return BackendResponseError(f"the recording {self.path} is empty", code="not_recorded")
        nearest = ranked[-1].request
        differences = "; ".join(
            f"{path}: recorded {_brief(old)}, asked {_brief(new)}" for path, old, new in explain(nearest, manifest)[:3]
        )
        return BackendResponseError(
            f"this request was not recorded; the nearest one is {_brief(_question(nearest), 80)}: {differences}",
            hint=f"record it into {self.path.name}",
            code="not_recorded",
        )


def read_header(path: Path) -> RecordingHeader:
    """Return the header of a recording.

    Raises:
        ConfigError: the file is not a recording.
    """
    with path.open(encoding="utf-8") as file:
        try:
            header = json.loads(file.readline() or "null")
        except ValueError:
            header = None
    if not isinstance(header, dict) or header.get("qvl_recording") != VERSION:
        raise ConfigError(f"{path} is not a recording of this version of qvl", hint="record it with RecordBackend")
    return cast("RecordingHeader", header)


def read_recording(path: Path) -> tuple[RecordingHeader, dict[str, RecordedExchange]]:
    """Return (header, exchanges by key). A last line that was cut off by a crash is ignored.

    Raises:
        ConfigError: the file does not exist, or it is not a recording.
    """
    exchanges: dict[str, RecordedExchange] = {}
    try:
        header = read_header(path)
        for line in _lines(path):
            exchange = exchanges.setdefault(line["key"], RecordedExchange(line["request"]))
            answer: RecordedAnswer = {"chunks": line["chunks"]}
            if "error" in line:
                answer["error"] = line["error"]
            exchange.answers.append(answer)
    except OSError as exc:
        raise ConfigError(f"the recording {path} cannot be read: {exc.strerror or exc}") from exc
    except (KeyError, TypeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the recording {path} has an invalid line: {exc!r}", hint="record it again") from exc
    return header, exchanges


def _lines(path: Path) -> Iterator[JsonObject]:
    with path.open(encoding="utf-8") as file:
        next(file)
        for number, line in enumerate(file, start=2):
            try:
                yield json.loads(line)
            except ValueError as exc:
                if line.endswith("\n"):
                    raise ConfigError(f"{path}, line {number} is not JSON: {exc}", hint="delete the line") from exc


def _spelt(manifest: JsonMapping) -> str:
    return json.dumps(manifest, ensure_ascii=False, sort_keys=True)[-4000:]


def _question(manifest: JsonMapping) -> str:
    texts = [part["text"] for message in manifest["messages"] for part in message["parts"] if "text" in part]
    return texts[-1] if texts else ""


def _brief(value: object, limit: int = 60) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str), limit)


def capabilities_to_json(have: Capabilities) -> JsonObject:
    """Return capabilities as JSON values; sets are sorted lists."""
    return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(have).items()}


def capabilities_from_json(data: JsonMapping) -> Capabilities:
    """Return the inverse of `capabilities_to_json`."""
    fields: JsonObject = {name: frozenset(v) if isinstance(v, list) else v for name, v in data.items()}
    return Capabilities(**fields)


def chunk_to_json(chunk: Chunk) -> RecordedChunk:
    """Return a chunk as JSON values, without empty fields and timing."""
    fields: JsonObject = {
        "text": chunk.text,
        "index": chunk.index,
        "reasoning": chunk.reasoning,
        "tool_calls": [asdict(call) for call in chunk.tool_calls],
        "logprobs": [_logprob_to_json(item) for item in chunk.logprobs],
        "finish_reason": chunk.finish_reason,
        "usage": None if chunk.usage is None else asdict(chunk.usage),
    }
    return cast("RecordedChunk", {name: value for name, value in fields.items() if value})


def chunk_from_json(data: RecordedChunk) -> Chunk:
    """Return the inverse of `chunk_to_json`."""
    usage = data.get("usage")
    return Chunk(
        text=data.get("text", ""),
        index=data.get("index", 0),
        reasoning=data.get("reasoning", ""),
        tool_calls=tuple(ToolCallDelta(**call) for call in data.get("tool_calls", ())),
        logprobs=tuple(map(_logprob_from_json, data.get("logprobs", ()))),
        finish_reason=data.get("finish_reason"),
        usage=None if usage is None else Usage(**usage),
        timing=None if usage is None else Timing(),
    )


def _logprob_to_json(item: TokenLogprob) -> RecordedLogprob:
    return item.token, item.logprob, item.bytes.hex(), [_logprob_to_json(top) for top in item.top]


def _logprob_from_json(data: RecordedLogprob) -> TokenLogprob:
    token, logprob, raw, top = data
    return TokenLogprob(token, logprob, bytes.fromhex(raw), tuple(map(_logprob_from_json, top)))


def error_to_json(error: QvlError) -> RecordedError:
    """Return an error as JSON values: its class, message and fields."""
    return {
        "class": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "param": error.param,
        "code": error.code,
    }


def error_from_json(data: RecordedError) -> QvlError:
    """Return the inverse of `error_to_json`; a BackendResponseError if its class is unknown."""
    kind = getattr(errors, str(data.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, QvlError)) or kind is errors.AnalysisError:
        kind = BackendResponseError
    made: QvlError = kind(data["message"], hint=data.get("hint"), param=data.get("param"), code=data.get("code"))
    return made
