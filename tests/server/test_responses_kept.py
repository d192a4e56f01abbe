"""Responses that are kept: conversations by `previous_response_id`, reading, deleting, one key apart from another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.caches.open import open_cache
from qvl.plugins.host import PluginHost
from tests.caches.redis_server import RedisServer, find_server
from tests.scripted_endpoint import ScriptedEndpoint
from tests.server.conftest import Running, data_url, start
from tests.server.test_messages import Thinker
from tests.server.test_openai_client import WEATHER


def client_of(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return client_of(server)


def test_a_conversation_goes_on_with_its_pictures_and_roles(client: openai.OpenAI, server: Running) -> None:
    image: Any = {"type": "input_image", "image_url": data_url("red"), "detail": "auto"}
    first = client.responses.create(
        model="echo-vl", input=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": [image]}]
    )
    assert first.store
    second = client.responses.create(model="echo-vl", input="and now", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    client.responses.create(model="echo-vl", input="the third", previous_response_id=second.id, instructions="new")
    told = server.backend.requests[-1]
    roles = "system system user assistant user assistant user"
    assert " ".join(message.role for message in told.messages) == roles
    assert len(told.pictures) == 1
    assert told.messages[-1].text == "the third"


def test_a_call_goes_on_from_its_response_alone(client: openai.OpenAI, server: Running) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    first = client.responses.create(model="echo-vl", input="use get_weather", tools=[tool])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = client.responses.create(model="echo-vl", input=[result], previous_response_id=first.id, tools=[tool])
    assert again.status == "completed"
    told = server.backend.requests[-1].messages
    assert [message.role for message in told] == ["user", "assistant", "tool"]
    assert told[1].tool_calls[0].id == told[2].tool_call_id


def test_a_stream_is_kept_before_it_ends(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo-vl", input="one two") as stream:
        whole = stream.get_final_response()
    assert client.responses.retrieve(whole.id).output_text == "one two"


def test_one_is_read_listed_and_deleted(client: openai.OpenAI) -> None:
    kept = client.responses.create(
        model="echo-vl", input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    )
    assert client.responses.retrieve(kept.id) == kept
    items = list(client.responses.input_items.list(kept.id))
    assert [item.content[0].text for item in items] == ["b", "a"]  # type: ignore[union-attr]
    assert len({item.id for item in items}) == 2
    assert client.responses.delete(kept.id) is None
    for again in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="does not exist, or has expired"):
            again(kept.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="echo-vl", input="x", previous_response_id=kept.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_was_sent_is_listed_in_pages(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": f"word {number}", "id": None} for number in range(23)]
    kept = client.responses.create(model="echo-vl", input=said)
    listed = client.responses.input_items.list
    first = listed(kept.id)
    assert (len(first.data), first.has_more) == (20, True)
    everything = [item.id for item in first]
    assert len(set(everything)) == 23
    assert None not in everything
    oldest = listed(kept.id, order="asc", limit=3, include=["message.input_image.image_url"])
    assert [item.content[0].text for item in oldest.data] == ["word 0", "word 1", "word 2"]  # type: ignore[union-attr]
    rest = listed(kept.id, order="asc", limit=100, after=oldest.data[-1].id)
    assert [item.id for item in rest.data] == everything[::-1][3:]
    assert not rest.has_more
    assert not listed(kept.id, after=everything[-1]).data
    for wrong in ({"limit": 0}, {"limit": 101}, {"after": "in_x"}, {"order": "up"}, {"include": ["x"]}):
        with pytest.raises(openai.BadRequestError) as caught:
            listed(kept.id, extra_query=wrong)
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(kept.id, extra_query={"starting_after": 3})


def test_a_reference_to_an_item_stands_for_it(client: openai.OpenAI, server: Running) -> None:
    kept = client.responses.create(model="echo-vl", input="one two")
    items: Any = [{"type": "item_reference", "id": kept.output[0].id}, {"role": "user", "content": "and now"}]
    client.responses.create(model="echo-vl", input=items)
    assert [message.text for message in server.backend.requests[-1].messages] == ["one two", "and now"]
    asked = client.responses.input_items.list(kept.id).data[0]
    items[0] = {"type": "item_reference", "id": asked.id}
    client.responses.create(model="echo-vl", input=items)
    told = server.backend.requests[-1].messages
    assert [(one.role, one.text) for one in told] == [("user", "one two"), ("user", "and now")]
    for ident in ("msg_" + "0" * 34, kept.output[0].id[:-2] + "ff", "msg"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="echo-vl", input=[{"type": "item_reference", "id": ident}])
        assert caught.value.param == "input[0].id"


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo-vl", input="x", store=False)
    assert not answer.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_one_key_cannot_reach_what_another_has_kept(serve) -> None:
    server = serve(api_keys=("a", "b"))
    mine, other = client_of(server, "a"), client_of(server, "b")
    kept = mine.responses.create(model="echo-vl", input="secret")
    for reach in (
        lambda: other.responses.retrieve(kept.id),
        lambda: other.responses.delete(kept.id),
        lambda: other.responses.input_items.list(kept.id),
        lambda: other.responses.create(model="echo-vl", input="x", previous_response_id=kept.id),
        lambda: other.responses.create(model="echo-vl", input=[{"type": "item_reference", "id": kept.output[0].id}]),
    ):
        with pytest.raises(openai.NotFoundError):
            reach()
    assert mine.responses.retrieve(kept.id).output_text == "secret"


def test_they_outlive_the_server_until_their_time_is_up(serve, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'answers.db'}"

    def running(**options: Any) -> Running:
        return serve(cache=open_cache(url, PluginHost().caches), **options)

    first = running()
    kept = client_of(first).responses.create(model="echo-vl", input="one")
    first.stop()
    second = running(response_ttl=0.05)
    client = client_of(second)
    following = client.responses.create(model="echo-vl", input="two", previous_response_id=kept.id)
    assert [message.text for message in second.backend.requests[-1].messages] == ["one", "one", "two"]
    while True:
        try:
            client.responses.retrieve(following.id)
        except openai.NotFoundError:
            break
    assert client.responses.retrieve(kept.id).output_text == "one"


def test_without_a_cache_the_request_says_what_is_missing(serve) -> None:
    client = client_of(serve(cache="off"))
    assert client.responses.create(model="echo-vl", input="x").store is False
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.BadRequestError, match="this server keeps no responses"):
            client.responses.create(model="echo-vl", input="x", **fields)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_the_background_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo-vl", input="x", background=True)
    assert caught.value.param == "background"
    kept = client.responses.create(model="echo-vl", input="x")
    with pytest.raises(openai.BadRequestError, match="only background responses"):
        client.responses.cancel(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")
    with pytest.raises(openai.BadRequestError, match="not streamed again"):
        client.responses.retrieve("resp_1", stream=True)


def test_what_agents_send_is_accepted(client: openai.OpenAI, server: Running) -> None:
    answer = client.responses.create(
        model="echo-vl",
        input="x",
        text={"verbosity": "low"},
        include=["reasoning.encrypted_content", "web_search_call.results"],
        reasoning={"summary": "auto"},
        max_tool_calls=3,
        safety_identifier="who",
        prompt_cache_key="shop",
        truncation="auto",
        extra_body={"top_k": 3, "repetition_penalty": 1.5, "stop": ["END"], "seed": 7},
    )
    assert (answer.max_tool_calls, answer.safety_identifier, answer.prompt_cache_key) == (3, "who", "shop")
    assert answer.completed_at >= answer.created_at  # type: ignore[operator]
    assert (answer.truncation, answer.text.verbosity) == ("auto", "low")  # type: ignore[union-attr]
    sampling = server.backend.requests[-1].sampling
    assert (sampling.top_k, sampling.repetition_penalty, sampling.stop, sampling.seed) == (3, 1.5, ("END",), 7)


def test_what_newer_clients_say_of_tools_called_directly(client: openai.OpenAI, server: Running) -> None:
    direct: Any = {"async": False, "defer_loading": False, "allowed_callers": ["direct"]}
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None, **direct}
    call: Any = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "async": False}
    result: Any = {"type": "function_call_output", "call_id": "c", "output": "red", "name": "f", "status": None}
    items: Any = [{"role": "user", "content": "x"}, call, result, {"role": "user", "content": "y"}]
    thinking: Any = {"context": "auto", "mode": "standard"}
    client.responses.create(model="echo-vl", input=items, tools=[tool], reasoning=thinking)
    assert [message.role for message in server.backend.requests[-1].messages] == ["user", "assistant", "tool", "user"]
    assert "defer_loading" not in str(server.backend.requests[-1].tools)
    body = {"model": "echo-vl", "max_tokens": 8, "messages": [{"role": "user", "content": "x"}], "speed": "standard"}
    plain = {"name": "f", "input_schema": {"type": "object"}}
    del direct["async"]
    assert (
        server.post("/v1/messages", {**body, "tools": [{**plain, **direct, "input_examples": []}]}).status_code == 200
    )
    for other in ({"defer_loading": True}, {"allowed_callers": ["code_execution_20260120"]}, {"input_examples": [{}]}):
        told = server.post("/v1/messages", {**body, "tools": [{**plain, **other}]})
        assert told.status_code == 400
        assert f"tools[0].{next(iter(other))}" in told.text
    slow: Any = {"async": True}
    for fields, param in (
        ({"input": items, "tools": [{**tool, **slow}]}, "tools[0].async"),
        ({"input": [items[0], {**call, **slow}, result]}, "input[1].async"),
    ):
        assert server.post("/v1/responses", {"model": "echo-vl", **fields}).json()["error"]["param"] == param


def test_a_verbosity_goes_on_to_an_endpoint_that_may_know_it(serve, endpoint: ScriptedEndpoint) -> None:
    behind = serve(OpenAIBackend("echo", base_url=endpoint.url, api_key="none", probe=False), cache=None)
    with closing(client_of(behind)) as asking:
        asking.responses.create(model="echo", input="x", text={"verbosity": "low"})
        asking.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}], verbosity="high")
    sent = [one.body for one in endpoint.requests if one.path.endswith("/chat/completions")]
    assert [one.get("verbosity") for one in sent] == ["low", "high"]


def test_only_allowed_tools_are_offered(client: openai.OpenAI, server: Running) -> None:
    tools: Any = [{"type": "function", "name": name, "parameters": {}} for name in ("one", "two")]
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "two"}]}
    client.responses.create(model="echo-vl", input="x", tools=tools, tool_choice=allowed)
    told = server.backend.requests[-1]
    assert ([tool.name for tool in told.tools], told.tool_choice) == (["two"], "required")
    allowed["tools"][0]["name"] = "three"
    with pytest.raises(openai.BadRequestError, match="unknown tool 'three'") as caught:
        client.responses.create(model="echo-vl", input="x", tools=tools, tool_choice=allowed)
    assert caught.value.param == "tool_choice.tools[0].name"


@pytest.fixture(scope="module")
def thinker() -> Iterator[Running]:
    running = start(Thinker())
    yield running
    running.stop()


ENCRYPTED: Any = ["reasoning.encrypted_content"]


@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_is_an_item_of_its_own_in_both_forms(thinker: Running, summary: Any) -> None:
    client = client_of(thinker)
    asked: Any = {"model": "echo-vl", "input": "x", "include": ENCRYPTED, "reasoning": {"summary": summary}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        thought: Any = answer.output[0]
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        told = thought.summary if summary else thought.content
        assert [part.text for part in told] == ["let me see"]
        assert not (thought.content if summary else thought.summary)
        assert thought.encrypted_content
    wanted = "response.reasoning_summary_text.delta" if summary else "response.reasoning_text.delta"
    assert wanted in kinds


def test_reasoning_that_is_not_wanted_is_no_item(thinker: Running) -> None:
    client = client_of(thinker)
    extra = {"include_reasoning": False}
    whole = client.responses.create(model="echo-vl", input="x", extra_body=extra)
    assert [item.type for item in whole.output] == ["message"]
    assert whole.output_text == "it is red"
    events = list(client.responses.create(model="echo-vl", input="x", stream=True, extra_body=extra))
    assert not any("reasoning" in event.type for event in events)
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.type for item in last.response.output] == ["message"]
    assert [event.sequence_number for event in events] == [*range(len(events))]


@pytest.mark.parametrize("fields", [{"return_token_ids": True}, {"prompt_logprobs": 2}])
def test_what_a_response_has_no_place_for_is_refused(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo-vl", input="x", extra_body=fields)
    assert caught.value.param == next(iter(fields))
    nothing = {"return_token_ids": False, "prompt_logprobs": None}
    assert client.responses.create(model="echo-vl", input="x", extra_body=nothing).output_text == "x"


def test_reasoning_sent_back_is_as_it_was(thinker: Running) -> None:
    client = client_of(thinker)
    thought, said = client.responses.create(model="echo-vl", input="x", include=ENCRYPTED).output
    items: Any = [{"role": "user", "content": "x"}, thought.model_dump(), said.model_dump()]
    items.append({"role": "user", "content": "y"})
    assert client.responses.create(model="echo-vl", input=items).status == "completed"
    blob = items[1]["encrypted_content"]
    for changed in (
        blob[:-1] + ("0" if blob[-1] != "0" else "1"),
        "AAAA" + blob[4:],
        blob.replace("qvl1.", "qvl1.A"),
        "x",
    ):
        items[1]["encrypted_content"] = changed
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="echo-vl", input=items)
        assert (caught.value.code, caught.value.param) == ("invalid_encrypted_content", "input[1].encrypted_content")


def test_a_long_conversation_is_shortened_where_that_is_asked_for(serve) -> None:
    pytest.importorskip("torch")
    from qvl.backends.local.backend import LocalBackend

    server = serve(LocalBackend(device="cpu", max_model_len=256))
    while server.get("/ready").status_code != 200:
        threading.Event().wait(0.05)
    client = client_of(server)
    turns: Any = [
        turn
        for number in range(12)
        for turn in (
            {"role": "user", "content": f"question {number} " * 8},
            {"role": "assistant", "content": "an answer"},
        )
    ]
    items = [{"role": "developer", "content": "be brief"}, *turns, {"role": "user", "content": "What brand is it?"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="bundled", input=items, max_output_tokens=8)
    assert caught.value.code == "context_length_exceeded"
    answer = client.responses.create(model="bundled", input=items, max_output_tokens=8, truncation="auto")
    assert answer.usage is not None
    assert 100 < answer.usage.input_tokens <= 248
    with client.responses.stream(model="bundled", input=items, max_output_tokens=8, truncation="auto") as stream:
        last: Any = list(stream)[-1]
    assert last.response.usage.input_tokens == answer.usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="bundled", input="brand " * 500, max_output_tokens=8, truncation="auto")


@pytest.mark.skipif(find_server() is None, reason="no redis-server")
def test_a_redis_keeps_them_for_every_server_and_as_long_as_told(serve, tmp_path: Path) -> None:
    with closing(RedisServer(tmp_path)) as redis:
        keys = {"api_keys": ("one", "two")}
        first = serve(cache=redis.url, response_ttl=1000.0, **keys)
        second = serve(cache=redis.url, response_ttl=1000.0, **keys)
        client, other, stranger = client_of(first, "one"), client_of(second, "one"), client_of(second, "two")
        asked = client.responses.create(model="echo-vl", input="the first")
        ident = asked.id
        assert other.responses.retrieve(ident).output_text == "the first"
        again = other.responses.create(model="echo-vl", input="and then", previous_response_id=ident)
        assert [message.text for message in second.backend.requests[-1].messages] == ["the first"] * 2 + ["and then"]
        assert [item.id for item in other.responses.input_items.list(again.id)]
        for call in (stranger.responses.retrieve, stranger.responses.delete):
            with pytest.raises(openai.NotFoundError):
                call(ident)
        with pytest.raises(openai.NotFoundError):
            stranger.responses.create(model="echo-vl", input="x", previous_response_id=ident)
        lengths = {int(redis.command(b"TTL " + key)[1:]) for key in kept_in(redis)}
        assert lengths
        assert all(900 < seconds <= 1000 for seconds in lengths)
        client.responses.delete(ident)
        for one in (client, other):
            with pytest.raises(openai.NotFoundError):
                one.responses.retrieve(ident)
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="echo-vl", input="x", previous_response_id=again.id)
        assert caught.value.code == "previous_response_not_found"
        # What has expired is gone from Redis and from every server.
        brief = serve(cache=redis.url, response_ttl=1.0, **keys)
        short = client_of(brief, "one").responses.create(model="echo-vl", input="not for long").id
        end = time.monotonic() + 30
        while True:
            try:
                other.responses.retrieve(short)
            except openai.NotFoundError:
                break
            assert time.monotonic() < end
            time.sleep(0.05)
        redis.kill()
        with pytest.raises(openai.APIStatusError) as down:
            client.responses.retrieve(again.id)
        assert down.value.status_code == 503
        # Its copy is lost, the answer is not.
        assert client.responses.create(model="echo-vl", input="all the same").output_text == "all the same"


def kept_in(redis: RedisServer) -> list[bytes]:
    """The keys of all entries."""
    words = redis.command(b"KEYS *").split(b"\r\n")
    names = [word for word in words if word and word[:1] not in (b"*", b"$")]
    return [name for name in names if redis.command(b"TTL " + name) != b":-1\r\n"]
