import asyncio
from pathlib import Path

from common import BRAND, FILE, MODEL, QUESTION, TEXT, URL, Picked, check, fails, run
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(name=MODEL, **options):
    model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
    return Agent(model, model_settings={"max_tokens": 64, "temperature": 0}, **options)


SEEN = [BinaryContent(Path(FILE).read_bytes(), media_type="image/png"), QUESTION]


def stream():
    async def read():
        async with agent().run_stream(SEEN) as told:
            return [piece async for piece in told.stream_text(delta=True)]

    check("".join(asyncio.run(read())), BRAND)


run(
    "pydantic-ai-slim",
    text=lambda: check(agent().run_sync(QUESTION).output, TEXT),
    picture=lambda: check(agent().run_sync(SEEN).output, BRAND),
    stream=stream,
    tools=lambda: Picked.model_validate(agent(output_type=ToolOutput(Picked)).run_sync("Pick.").output),
    structured=lambda: Picked.model_validate(agent(output_type=NativeOutput(Picked)).run_sync("Pick.").output),
    error=lambda: fails(lambda: agent("nope").run_sync("x"), ModelHTTPError),
)
