import openai
from common import BRAND, DATA_URL, MODEL, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
PARTS = [{"type": "input_image", "image_url": DATA_URL, "detail": "auto"}, {"type": "input_text", "text": QUESTION}]
ITEMS = [{"role": "user", "content": PARTS}]
TOOL = {"type": "function", "name": "pick_size", "parameters": SCHEMA, "strict": True}


def create(given, **fields):
    return client.responses.create(**{"model": MODEL, "input": given, "max_output_tokens": 64} | fields)


def stream():
    with client.responses.stream(model=MODEL, input=ITEMS) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        check(text, BRAND)
        check(events.get_final_response().output_text, BRAND)


def tools():
    chosen = {"type": "function", "name": "pick_size"}
    first = create("Pick.", tools=[TOOL], tool_choice=chosen)
    (call,) = [item for item in first.output if item.type == "function_call"]
    Picked.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    create([result], previous_response_id=first.id)


def structured():
    told = client.responses.parse(model=MODEL, input="Pick.", text_format=Picked)
    assert told.output_parsed.size in ("small", "large")


run(
    "openai",
    text=lambda: check(create(QUESTION).output_text, TEXT),
    picture=lambda: check(create(ITEMS).output_text, BRAND),
    stream=stream,
    tools=tools,
    structured=structured,
    error=lambda: fails(lambda: create("x", model="nope"), openai.NotFoundError),
)
