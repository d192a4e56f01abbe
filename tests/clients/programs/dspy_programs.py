import json

import dspy
from common import BRAND, DATA_URL, MODEL, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run

PARTS = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": QUESTION}]
# DSPy's own adapters prompt for their format, which takes a larger model; what they send is the server's part.
FORMAT = {"type": "json_schema", "json_schema": {"name": "pick", "schema": SCHEMA, "strict": True}}


def model(name=MODEL):
    return dspy.LM(
        f"openai/{name}", api_base=f"{URL}/v1", api_key="none", cache=False, num_retries=0, max_tokens=64, temperature=0
    )


def said(*given, **more):
    (answer,) = model()(*given, **more)
    return answer["text"] if isinstance(answer, dict) else answer


run(
    "dspy",
    text=lambda: check(said(QUESTION), TEXT),
    picture=lambda: check(said(messages=[{"role": "user", "content": PARTS}]), BRAND),
    structured=lambda: Picked.model_validate(json.loads(said("Pick.", response_format=FORMAT))),
    error=lambda: fails(lambda: model("nope")("x"), Exception),
)
