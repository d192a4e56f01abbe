"""A user's program of every verb, which nobody runs: a type checker reads it as an editor would."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import assert_type

from pydantic import BaseModel

from qvl import AnalysisResult, AsyncPipeline, MapItem, MapResults, Pipeline, ProductAnalysis, Result
from qvl.caches.memory import MemoryCache
from qvl.types import CacheState


class Bill(BaseModel):
    total: float


@dataclass
class Label:
    text: str


def blocking() -> None:
    with Pipeline("openai:qwen3-vl", cache=MemoryCache(), base_url="http://localhost:8000/v1") as pipe:
        answer = pipe.ask("mug.jpg", "What brand is it?", temperature=0.5, max_tokens=20, stop=["\n"], cache="refresh")
        assert_type(answer, Result)
        assert_type(answer.text, str)
        assert_type(answer.cache, CacheState)
        assert_type(answer.timing.total, float)
        assert_type(answer.usage.prompt_tokens, int)
        said = pipe.chat([{"role": "user", "content": "Hello"}], seed=1, extra={"guided": True})
        print(said.text, "".join(chunk.text for chunk in pipe.stream(b"...", "What is it?", top_p=0.9)))
        product = pipe.analyze(["front.jpg", "back.jpg"], language="zh")
        assert_type(product, ProductAnalysis)
        assert_type(product.brand, str | None)
        assert_type(pipe.analyze("bill.png", schema=Bill, max_pixels=1_000_000).total, float)
        assert_type(pipe.analyze_result("label.png", schema=Label), AnalysisResult[Label])
        for item in pipe.map(["a.jpg", "b.jpg"], concurrency=2):
            assert_type(item, MapItem[ProductAnalysis])
            if item.value is not None:
                print(item.value.category, item.source)
        for bill in pipe.map(["a.jpg"], schema=Bill, cache="off"):
            assert_type(bill.value, Bill | None)
        assert_type(pipe.map(["a.jpg"], schema=Bill), MapResults[Bill])
        pipe.map(["a.jpg"]).to_csv("a.csv")
        for reply in pipe.map(["a.jpg"], "What is it?"):
            assert_type(reply.value, Result | None)


async def asynchronous() -> None:
    async with AsyncPipeline(cache="off") as pipe:
        assert_type(await pipe.ask([], "Hello?", tools=[{"name": "look"}]), Result)
        assert_type(await pipe.analyze("bill.png", schema=Bill), Bill)
        assert_type((await pipe.analyze_result("mug.jpg")).value, ProductAnalysis)
        async for chunk in pipe.stream_chat([{"role": "user", "content": "Hello"}]):
            print(chunk.text)
        await pipe.map(["a.jpg"]).to_csv("a.csv")
        async for item in pipe.map(["a.jpg"], schema=Label):
            assert_type(item.value, Label | None)


if __name__ == "__main__":
    blocking()
    asyncio.run(asynchronous())
