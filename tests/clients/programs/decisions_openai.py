"""OpenAI's client, blocking and asynchronous: 3 pictures and 40 questions, one with a picture of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

import openai

url, model, picture = sys.argv[1:]
shown = {
    "type": "input_image",
    "image_url": "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode(),
}
kinds = (
    {"type": "predicate"},
    {"type": "choice", "choices": [{"value": "red", "description": "any red"}, {"value": True}, {"value": "true"}]},
    {"type": "score", "levels": [{"label": "bad"}, {"label": "fair"}, {"label": "good"}]},
)
body = {
    "model": model,
    "input": [
        {"role": "user", "content": [shown, {"type": "input_json", "data": {"price": 7}}, shown]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [shown]},
    ],
    "questions": [
        {**kinds[n % 3], "name": f"q{n}", "instructions": [{"type": "input_text", "text": f"Number {n}?"}]}
        for n in range(39)
    ]
    + [{"type": "predicate", "instructions": [{"type": "input_text", "text": "Is it this one?"}, shown]}],
}


def check(decision: openai.types.Decision) -> None:
    assert len(decision.answers) == 40
    for number, answer in enumerate(decision.answers[:39]):
        assert (answer.type, answer.name) == (kinds[number % 3]["type"], f"q{number}"), answer
        if answer.type == "predicate":
            assert 0 <= answer.probability <= 1
        else:
            assert abs(sum(item.probability for item in answer.probabilities) - 1) < 1e-6
    assert [item.value for item in decision.answers[1].probabilities] == ["red", True, "true"]
    assert decision.usage.total_tokens == decision.usage.input_tokens + decision.usage.output_tokens
    assert decision.usage.input_tokens_details.cached_tokens > 0


with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
    check(client.decisions.create(**body))
    fault = None
    try:
        client.decisions.create(**{**body, "questions": [{"type": "choice", "instructions": "?", "choices": []}]})
    except openai.BadRequestError as exc:
        fault = exc.param
    assert fault == "questions[0].choices", fault


async def ask() -> openai.types.Decision:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        return await client.decisions.create(**body)


check(asyncio.run(ask()))
print(json.dumps({"version": openai.__version__}))
