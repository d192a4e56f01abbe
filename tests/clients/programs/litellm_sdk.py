import litellm
from common import BRAND, DATA_URL, MODEL, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run

PARTS = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": QUESTION}]
TOOL = {"type": "function", "function": {"name": "pick_size", "parameters": SCHEMA}}


def ask(content, name=f"openai/{MODEL}", base=f"{URL}/v1", **more):
    messages = [{"role": "user", "content": content}]
    return litellm.completion(name, messages, api_base=base, api_key="none", max_tokens=64, num_retries=0, **more)


def picture():
    check(ask(PARTS).choices[0].message.content, BRAND)
    # The same question through the Messages API.
    check(ask(PARTS, f"anthropic/{MODEL}", URL).choices[0].message.content, BRAND)


def tools():
    chosen = {"type": "function", "function": {"name": "pick_size"}}
    for name, base in ((f"openai/{MODEL}", f"{URL}/v1"), (f"anthropic/{MODEL}", URL)):
        (call,) = ask("Pick.", name, base, tools=[TOOL], tool_choice=chosen).choices[0].message.tool_calls
        Picked.model_validate_json(call.function.arguments)


def stream():
    check("".join(piece.choices[0].delta.content or "" for piece in ask(PARTS, stream=True)), BRAND)


def structured():
    Picked.model_validate_json(ask("Pick.", response_format=Picked).choices[0].message.content)


run(
    "litellm",
    text=lambda: check(ask(QUESTION).choices[0].message.content, TEXT),
    picture=picture,
    stream=stream,
    tools=tools,
    structured=structured,
    error=lambda: fails(lambda: ask("x", "openai/nope"), litellm.NotFoundError),
)
