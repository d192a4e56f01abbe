import asyncio
from pathlib import Path

from common import BRAND, FILE, MODEL, QUESTION, TEXT, URL, Picked, check, fails, run
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider


def agent(name=MODEL, **options):
    model = AnthropicModel(name, provider=AnthropicProvider(base_url=URL, api_key="none"))
    return Agent(model, model_settings={"max_tokens": 64}, **options)


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
    error=lambda: fails(lambda: agent("nope").run_sync("x"), ModelHTTPError),
)
