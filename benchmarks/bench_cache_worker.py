"""Measurement of one store for `bench_cache.py`: each picture without the store, as a miss, then as repeated hits.

    python benchmarks/bench_cache_worker.py STORE PICTURES FOLDER ROUNDS [HOST:PORT of a Redis server]

The model answers at once with a constant text. One call is timed, from the picture's bytes to the answer's text, as a
user of each library writes it; then the store's get and set alone, with the arguments of that library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWER = "A red mug by NORVIK with a large handle, seen from the side. " * 5
QUESTION = "What is on sale here? Answer in a few words."


class Store:
    """`ask` is a call with the cache, `plain` one without; `get` and `put` are the store alone."""

    ask: Callable[[bytes], str]
    plain: Callable[[bytes], str]
    get: Callable[[bytes], Any]
    put: Callable[[bytes], Any]

    def forget(self) -> None:
        """Forgets what it knows of pictures besides the stored answers, as a new process would."""
        return

    def close(self) -> None:
        return


def data_url(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def messages(picture: bytes) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


class Qvl(Store):
    def __init__(self, kind: str, folder: Path, redis: str) -> None:
        from qvl import Pipeline
        from qvl.backends.base import Backend, Capabilities
        from qvl.types import Chunk, Usage

        class Canned(Backend):
            name, model = "canned", "canned"
            capabilities = Capabilities(images=8)

            def peek_identity(self) -> dict[str, Any]:
                return self.identity()

            async def stream(self, request: Any) -> Any:
                yield Chunk(text=ANSWER)
                yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=500, completion_tokens=60))

        urls = {
            "sqlite": f"sqlite:///{folder / 'answers.db'}",
            "redis": f"redis://{redis}/0?front=0",
            "tiered": f"redis://{redis}/0",
            "memory": "memory:",
        }
        self.first = self.pipe = Pipeline(backend=Canned(), cache=urls[kind])
        self.cache = self.first.pipeline.executor.store.cache
        self.anew = lambda: Pipeline(backend=Canned(), cache=self.cache)
        self.off = Pipeline(backend=Canned(), cache="off")
        self.ask = lambda picture: self.pipe.ask(picture, QUESTION).text
        self.plain = lambda picture: self.off.ask(picture, QUESTION).text
        self.entry: Any = None
        self.get = lambda picture: self.cache.get(self.key(picture))
        self.put = lambda picture: self.cache.set(self.key(picture), self.entry)
        self.keys: dict[bytes, str] = {}

    def forget(self) -> None:
        if self.pipe is not self.first:
            self.pipe.close()
        self.pipe = self.anew()

    def key(self, picture: bytes) -> str:
        if self.entry is None:
            self.entry = next(self.cache.items())[1]
        if picture not in self.keys:
            self.keys[picture] = f"sha256:{hashlib.sha256(picture).hexdigest()}"
        return self.keys[picture]

    def close(self) -> None:
        self.forget()
        self.first.close()
        self.off.close()


class LangChain(Store):
    def __init__(self, kind: str, folder: Path, redis: str) -> None:
        from langchain_community.cache import RedisCache, SQLiteCache
        from langchain_core.language_models import BaseChatModel
        from langchain_core.load import dumps
        from langchain_core.messages import AIMessage, HumanMessage
        from langchain_core.outputs import ChatGeneration, ChatResult

        class Canned(BaseChatModel):
            def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
                return ChatResult(generations=[ChatGeneration(message=AIMessage(ANSWER))])

            @property
            def _llm_type(self) -> str:
                return "canned"

        if kind == "sqlite":
            cache: Any = SQLiteCache(database_path=str(folder / "langchain.db"))
        else:
            from redis import Redis

            host, _, port = redis.partition(":")
            cache = RedisCache(Redis(host=host, port=int(port)))
        cached, plain = Canned(cache=cache), Canned(cache=False)

        def ask(model: Canned, picture: bytes) -> str:
            return model.invoke([HumanMessage(messages(picture)[0]["content"])]).text

        answer = [ChatGeneration(message=AIMessage(ANSWER))]
        self.prompts: dict[bytes, str] = {}

        def prompt(picture: bytes) -> str:
            if picture not in self.prompts:
                self.prompts[picture] = dumps([HumanMessage(messages(picture)[0]["content"])])
            return self.prompts[picture]

        self.prompt = prompt
        self.ask = lambda picture: ask(cached, picture)
        self.plain = lambda picture: ask(plain, picture)
        self.get = lambda picture: cache.lookup(prompt(picture), "alone")
        self.put = lambda picture: cache.update(prompt(picture), "alone", answer)


class LiteLLM(Store):
    def __init__(self, kind: str, folder: Path, redis: str) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        import litellm
        from litellm.caching.caching import Cache

        litellm.suppress_debug_info = True
        host, _, port = redis.partition(":")
        where = {"disk_cache_dir": str(folder)} if kind == "disk" else {"host": host, "port": port}
        litellm.cache = cache = Cache(type=kind, **where)
        arguments: dict[str, Any] = {"model": "openai/bench", "mock_response": ANSWER, "api_key": "none"}

        def ask(picture: bytes, caching: bool) -> str:
            answer = litellm.completion(messages=messages(picture), caching=caching, **arguments)
            return answer.choices[0].message.content

        self.ready: dict[bytes, Any] = {}

        def messages_about(picture: bytes) -> Any:
            if picture not in self.ready:
                self.ready[picture] = messages(picture)
            return self.ready[picture]

        result = litellm.completion(messages=[{"role": "user", "content": "x"}], caching=False, **arguments)
        self.ask = lambda picture: ask(picture, True)
        self.plain = lambda picture: ask(picture, False)
        self.get = lambda picture: cache.get_cache(model="alone", messages=messages_about(picture))
        self.put = lambda picture: cache.add_cache(result, model="alone", messages=messages_about(picture))


class DiskCache(Store):
    def __init__(self, kind: str, folder: Path, redis: str) -> None:
        from diskcache import Cache

        self.cache = cache = Cache(str(folder))

        def answer(picture: bytes, question: str) -> str:
            return ANSWER

        remembered = cache.memoize()(answer)

        def hashed(picture: bytes) -> str:
            key = hashlib.sha256(picture + QUESTION.encode()).hexdigest()
            if (result := cache.get(key)) is None:
                result = answer(picture, QUESTION)
                cache.set(key, result)
            return result

        self.keys: dict[bytes, Any] = {}

        def key(picture: bytes) -> Any:
            if kind == "memoize":
                return (picture, "alone")
            if picture not in self.keys:
                self.keys[picture] = "alone" + hashlib.sha256(picture).hexdigest()
            return self.keys[picture]

        self.ask = hashed if kind == "hashed" else lambda picture: remembered(picture, QUESTION)
        self.plain = lambda picture: answer(picture, QUESTION)
        self.get = lambda picture: cache.get(key(picture))
        self.put = lambda picture: cache.set(key(picture), ANSWER)

    def close(self) -> None:
        self.cache.close()


KINDS: dict[str, type[Store]] = {"qvl": Qvl, "langchain": LangChain, "litellm": LiteLLM, "diskcache": DiskCache}


def timed(work: Callable[[bytes], Any], pictures: list[bytes], *, expect: str | None = None) -> list[list[float]]:
    """Seconds by the clock and of processor time, of each call."""
    took = []
    for picture in pictures:
        began, used = time.perf_counter(), time.process_time()
        result = work(picture)
        took.append([time.perf_counter() - began, time.process_time() - used])
        if expect is not None and result != expect:
            raise SystemExit(f"not the answer: {result!r}")
    return took


def stored_bytes(folder: Path, redis: str) -> int:
    """Bytes of all files, or of all keys with their values in Redis."""
    if redis:
        from redis import Redis

        host, _, port = redis.partition(":")
        with Redis(host=host, port=int(port)) as client:
            return sum(client.memory_usage(key) or 0 for key in client.scan_iter())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    name, pictures, folder, rounds, *redis = sys.argv[1:]
    library, _, kind = name.partition("-")
    where = redis[0] if redis else ""
    first, *rest = [path.read_bytes() for path in sorted(Path(pictures).iterdir())]
    store = KINDS[library](kind, Path(folder), where)
    for _ in range(3):
        timed(store.plain, [first], expect=ANSWER)
        timed(store.ask, [first], expect=ANSWER)
    figures: dict[str, Any] = {"off": [], "miss": [], "hash": [], "hit": [], "again": []}
    # Turn by turn, so that a machine that is busy for a while is busy for both sides of a difference.
    for picture in rest:
        figures["off"] += timed(store.plain, [picture], expect=ANSWER)
        figures["miss"] += timed(store.ask, [picture], expect=ANSWER)
    for _ in range(int(rounds)):
        store.forget()
        timed(store.ask, [first], expect=ANSWER)
        for picture in rest:
            figures["hash"] += timed(lambda data: hashlib.sha256(data).digest(), [picture])
            figures["hit"] += timed(store.ask, [picture], expect=ANSWER)
            # Another copy of the same bytes, as from reading the file once more.
            figures["again"] += timed(store.ask, [bytes(bytearray(picture))], expect=ANSWER)
    # The keys, or what the peers have in their place, are made before the store is timed.
    timed(store.get, [first, *rest])
    timed(store.put, [first])
    figures["set"] = timed(store.put, rest)
    timed(store.get, rest)
    figures["get"] = timed(store.get, rest * int(rounds))
    store.close()
    # Every picture twice: by the call, and by the store alone.
    figures["bytes"] = stored_bytes(Path(folder), where) / (2 + 2 * len(rest))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
