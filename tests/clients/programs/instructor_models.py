import instructor
import openai
from common import DATA_URL, MODEL, QUESTION, URL, Picked, fails, run


def ask(mode, content="Pick.", name=MODEL, **more):
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": content}]
    wrapped = instructor.from_openai(client, mode=mode)
    return wrapped.chat.completions.create(
        model=name, messages=messages, response_model=Picked, max_retries=1, max_tokens=64, **more
    )


PARTS = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": QUESTION}]


def stream():
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=instructor.Mode.TOOLS
    )
    messages = [{"role": "user", "content": "Pick."}]
    *_, last = client.chat.completions.create_partial(
        model=MODEL, messages=messages, response_model=Picked, max_tokens=64
    )
    Picked.model_validate(last.model_dump())


run(
    "instructor",
    picture=lambda: Picked.model_validate(ask(instructor.Mode.TOOLS, PARTS).model_dump()),
    stream=stream,
    tools=lambda: Picked.model_validate(ask(instructor.Mode.TOOLS).model_dump()),
    structured=lambda: Picked.model_validate(ask(instructor.Mode.JSON_SCHEMA).model_dump()),
    error=lambda: fails(lambda: ask(instructor.Mode.TOOLS, name="nope"), Exception),
)
