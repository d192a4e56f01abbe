import json

import anthropic
from common import BRAND, MODEL, PNG, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
PARTS = [IMAGE, {"type": "text", "text": QUESTION}]
TOOL = {"name": "pick_size", "input_schema": SCHEMA}


def fields(content, **more):
    return {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": content}]} | more


def create(content, **more):
    return client.messages.create(**fields(content, **more))


def stream():
    with client.messages.stream(**fields(PARTS)) as told:
        check("".join(told.text_stream), BRAND)
        assert told.get_final_message().stop_reason == "end_turn"


def tools():
    first = create("Pick.", tools=[TOOL], tool_choice={"type": "tool", "name": "pick_size"})
    (call,) = first.content
    Picked.model_validate(call.input)

    def history(*shown):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [*shown, {"type": "text", "text": "large"}]}
        return [
            {"role": "user", "content": "Pick."},
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result, {"type": "text", "text": QUESTION}]},
        ]

    # The bundled model was taught no tools, so the tokens tell that it is shown the picture.
    seen, unseen = (create("", messages=history(*shown), tools=[TOOL]) for shown in ([IMAGE], []))
    assert seen.content[0].text
    assert seen.usage.input_tokens > unseen.usage.input_tokens + 16


def structured():
    told = create("Pick.", output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    Picked.model_validate(json.loads(told.content[0].text))


def error():
    fails(lambda: create("x", model="nope"), anthropic.NotFoundError)


def picture():
    check(create(PARTS).content[0].text, BRAND)
    counted = client.messages.count_tokens(model=MODEL, messages=fields(PARTS)["messages"])
    assert counted.input_tokens > 10


run(
    "anthropic",
    text=lambda: check(create(QUESTION).content[0].text, TEXT),
    picture=picture,
    stream=stream,
    tools=tools,
    structured=structured,
    error=error,
)
