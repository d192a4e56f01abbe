"""Messages and pictures that nobody would write: what can be answered is, and the rest is told so."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.conftest import Running, data_url, picture, question
from tests.server.test_errors import well_formed

CHAT = "/v1/chat/completions"
# Shrinking over HTTP would outlast the test's own time; what failed is small enough to be read.
QUICK = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
    phases=[Phase.generate],
)
# Text that JSON and UTF-8 can carry: half a surrogate pair cannot.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
URLS = st.sampled_from([data_url("red"), data_url("blue", (40, 30)), data_url("green", (32, 32), "JPEG")])
TEXT_PARTS = st.builds(lambda text: {"type": "text", "text": text}, TEXT)
IMAGE_PARTS = st.builds(
    lambda url, detail: {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}},
    URLS,
    st.sampled_from([None, "auto", "low", "high"]),
)
CALLS = st.builds(
    lambda name, arguments: {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}},
    st.from_regex(r"\A[a-z_]{1,20}\Z"),
    st.sampled_from(["{}", '{"a": [1, 2]}', ""]),
)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(TEXT_PARTS | IMAGE_PARTS, min_size=1, max_size=4)}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none(), "tool_calls": st.lists(CALLS, min_size=1)}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": st.just("call_1"), "content": TEXT}),
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
NODE = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(TEXT, LEAF, max_size=3)
JSON = NODE | st.lists(NODE, max_size=3) | st.dictionaries(TEXT, NODE, max_size=3)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def pictures_in(messages: list[Any]) -> int:
    return sum(
        part["type"] == "image_url"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )


@QUICK
@given(messages=st.lists(MESSAGES, min_size=1, max_size=5), stream=st.booleans())
def test_well_formed_messages_are_answered_in_their_order(
    server: Running, client: httpx.Client, messages: list[Any], stream: bool
) -> None:
    seen = len(server.backend.requests)
    body = {"messages": messages, "stream": stream}
    answer = client.post(CHAT, json=body, headers={"Cache-Control": "no-store"})
    if pictures_in(messages) > 8:
        assert well_formed(answer, 400)["code"] == "unsupported_parameter"
        return
    assert answer.status_code == 200, answer.text
    (asked,) = server.backend.requests[seen:]
    roles = ["system" if message["role"] == "developer" else message["role"] for message in messages]
    assert [message.role for message in asked.messages] == roles
    for message, given_ in zip(asked.messages, messages, strict=True):
        content = given_["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or ()]
        assert message.text == "".join(parts)
    assert len(asked.pictures) == pictures_in(messages)


@QUICK
@given(body=st.dictionaries(st.sampled_from(["messages", "model", "stream", "stop", "tools", "n", "x"]), JSON))
def test_any_json_gets_an_answer_or_a_well_formed_error(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post(CHAT, json=body)
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        well_formed(answer)


def spoilt(rng: random.Random, data: bytes) -> bytes:
    """A picture with bytes changed, cut off, doubled or put in."""
    place = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.randrange(1, 60)) + data[place:]
    if kind == 2:
        return data[:place] + data[place // 2 :]
    spoiled = bytearray(data)
    for _ in range(rng.randrange(1, 20)):
        spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    return bytes(spoiled)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_spoilt_pictures_get_an_answer_or_a_well_formed_error(client: httpx.Client, form: str) -> None:
    rng = random.Random(form)
    data = picture("red", (90, 70), form)
    refused = 0
    for number in range(170):
        url = f"data:image/{form.lower()};base64,{base64.b64encode(spoilt(rng, data)).decode()}"
        answer = client.post(CHAT, json=question(f"{number}", url))
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            refused += 1
            error = well_formed(answer)
            assert error["code"].startswith("image_") or error["code"] == "invalid_image"
            assert error["param"] == "messages[0].content[0].image_url"
    assert refused > 20
    assert client.get("/ready").status_code == 200
