import openai
from common import BRAND, DATA_URL, MODEL, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
PARTS = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": QUESTION}]
TOOL = {"type": "function", "function": {"name": "pick_size", "parameters": SCHEMA}}


def create(content, **fields):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 64} | fields)


def stream():
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(PARTS, stream=True)]
    check("".join(pieces), BRAND)


def tools():
    chosen = {"type": "function", "function": {"name": "pick_size"}}
    (call,) = create("Pick.", tools=[TOOL], tool_choice=chosen).choices[0].message.tool_calls
    Picked.model_validate_json(call.function.arguments)


def structured():
    messages = [{"role": "user", "content": "Pick."}]
    told = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Picked)
    assert told.choices[0].message.parsed.size in ("small", "large")


run(
    "openai",
    text=lambda: check(create(QUESTION).choices[0].message.content, TEXT),
    picture=lambda: check(create(PARTS).choices[0].message.content, BRAND),
    stream=stream,
    tools=tools,
    structured=structured,
    error=lambda: fails(lambda: create("x", model="nope"), openai.NotFoundError),
)
