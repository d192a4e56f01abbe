"""What a user of the Pipeline is promised: the right answer, remembered under the right key, asked for once."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel

from qvl import AsyncPipeline, Pipeline
from qvl.backends.base import Capabilities
from qvl.caches.memory import MemoryCache
from qvl.errors import (
    AnalysisError,
    BackendUnavailableError,
    CacheError,
    ConfigError,
    MediaError,
    RequestError,
    UnsupportedInputError,
)
from qvl.types import Chunk

from .conftest import ANSWER, TalkingBackend, answer_json, answering, followers, until


def run(main: Any) -> Any:
    return asyncio.run(main)


def test_ask_sends_picture_and_question_and_folds_the_stream(picture: Image.Image) -> None:
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="off") as pipe:
        result = pipe.ask(picture, "What brand is it?", system="Be short.")
    assert result.text == "1:What brand is it?"
    assert result.finish_reason == "stop"
    assert result.usage.prompt_tokens == 10
    assert result.cache == "bypass"
    assert result.request_id.startswith("qvl-")
    roles = [message.role for message in backend.requests[0].messages]
    assert roles == ["system", "user"]
    assert backend.closed == 1


def test_second_ask_is_a_hit_and_a_changed_question_is_not(picture: Image.Image) -> None:
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="memory:") as pipe:
        states = [pipe.ask(picture, question).cache for question in ("a", "a", "b")]
    assert states == ["miss", "hit", "miss"]
    assert len(backend.requests) == 2


def test_another_picture_order_is_another_answer(pictures: list[str]) -> None:
    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe:
        first, second = pipe.ask(pictures[:2], "q"), pipe.ask(pictures[1::-1], "q")
    assert first.cache == second.cache == "miss"
    assert first.key != second.key


@pytest.mark.parametrize(
    ("mode", "params", "states"),
    [
        ("auto", {"temperature": 0.7}, ["bypass", "bypass"]),
        ("auto", {"temperature": 0.7, "seed": 1}, ["miss", "hit"]),
        ("always", {"temperature": 0.7}, ["miss", "hit"]),
        ("off", {}, ["bypass", "bypass"]),
        ("refresh", {}, ["miss", "miss"]),
    ],
)
def test_cache_modes(picture: Image.Image, mode: Any, params: dict[str, Any], states: list[str]) -> None:
    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe:
        assert [pipe.ask(picture, "q", cache=mode, **params).cache for _ in range(2)] == states


def test_tenants_do_not_share_answers(picture: Image.Image) -> None:
    cache = MemoryCache()
    backend = TalkingBackend()
    for name in ("a", "b"):
        pipe = Pipeline(backend=backend, cache=cache, namespace=name)
        assert pipe.ask(picture, "q").cache == "miss"


def test_stream_yields_pieces_and_a_hit_streams_too(picture: Image.Image) -> None:
    with Pipeline(backend=TalkingBackend(reply=lambda _: "one two three"), cache="memory:") as pipe:
        cold = list(pipe.stream(picture, "q"))
        warm = list(pipe.stream(picture, "q"))
    assert [chunk.text for chunk in cold] == ["one", " two", " three", ""]
    assert "".join(chunk.text for chunk in warm) == "one two three"
    assert warm[-1].finish_reason == "stop"
    assert warm[-1].usage == cold[-1].usage


def test_identical_requests_in_flight_share_one_inference(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            backend.gate = asyncio.Event()
            waiting = [asyncio.create_task(pipe.ask(picture, "q")) for _ in range(5)]
            await until(lambda: backend.running and followers(pipe) == 5)
            backend.gate.set()
            results = await asyncio.gather(*waiting)
        assert len(backend.requests) == 1
        assert sorted(result.cache for result in results) == ["coalesced"] * 4 + ["miss"]
        assert len({result.request_id for result in results}) == 5

    run(main())


def test_who_leaves_does_not_take_the_work_with_them(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            backend.gate = asyncio.Event()
            leader = asyncio.create_task(pipe.ask(picture, "q"))
            while not backend.running:
                await asyncio.sleep(0.001)
            follower = asyncio.create_task(pipe.ask(picture, "q"))
            await until(lambda: followers(pipe) == 2)
            leader.cancel()
            await asyncio.gather(leader, return_exceptions=True)
            backend.gate.set()
            assert (await follower).text == "1:q"
        assert backend.aborted == 0

    run(main())


def test_when_the_last_one_leaves_the_backend_is_told(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            backend.gate = asyncio.Event()
            tasks = [asyncio.create_task(pipe.ask(picture, "q")) for _ in range(2)]
            await until(lambda: backend.running and followers(pipe) == 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert backend.running == 0
            assert backend.aborted == 1
            assert pipe.stats()["num_flights"] == 0

    run(main())


def test_closing_a_stream_aborts(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend(reply=lambda _: "many words to come")
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            stream = pipe.stream(picture, "q")
            assert isinstance(await anext(stream), Chunk)
            await stream.aclose()
            assert backend.running == 0

    run(main())


def test_errors_are_not_cached(picture: Image.Image) -> None:
    def fail_once(request: Any) -> str:
        if len(backend.requests) == 1:
            raise BackendUnavailableError("gone")
        return "back"

    backend = TalkingBackend(reply=fail_once)
    with Pipeline(backend=backend, cache="memory:") as pipe:
        with pytest.raises(BackendUnavailableError):
            pipe.ask(picture, "q")
        assert pipe.ask(picture, "q").text == "back"


class FailingCache(MemoryCache):
    gone = True

    def _try(self) -> None:
        if self.gone:
            raise CacheError("the disk is gone")

    def get(self, key: str) -> Any:
        self._try()
        return super().get(key)

    def set(self, key: str, entry: Any, *, ttl: float | None = None) -> None:
        self._try()
        super().set(key, entry, ttl=ttl)

    def lease(self, key: str, ttl: float) -> Any:
        self._try()
        return super().lease(key, ttl)


def test_a_failing_cache_is_a_miss_and_counted(picture: Image.Image) -> None:
    with Pipeline(backend=TalkingBackend(), cache=FailingCache()) as pipe:
        assert pipe.ask(picture, "q").text == "1:q"
        assert pipe.stats()["cache_failures"] >= 2


def test_an_outage_of_the_cache_is_one_warning(picture: Image.Image, caplog: pytest.LogCaptureFixture) -> None:
    cache = FailingCache()
    cache.instant = False
    with Pipeline(backend=TalkingBackend(), cache=cache) as pipe:
        for gone, warnings in ((True, 1), (False, 1), (True, 2)):
            cache.gone = gone
            for number in range(3):
                pipe.ask(picture, f"{gone} {warnings} {number}")
            assert len([record for record in caplog.records if record.levelname == "WARNING"]) == warnings


def test_analyze_is_typed_confident_and_cached(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering(answer_json()))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first = pipe.analyze_result(picture)
        again = pipe.analyze_result(picture)
    value = first.value
    assert (value.brand, value.category, value.attributes) == ("NORVIK", "mug", {"color": "red"})
    assert value.field_confidence == {"brand": 0.5, "category": 0.5, "attributes.color": 0.5}
    assert value.confidence == pytest.approx(0.125)
    assert value.confidence_method == "token_probability_product"
    assert (first.result.cache, again.result.cache) == ("miss", "hit")
    assert again.value == value
    assert len(backend.requests) == 1


def test_what_shapes_any_request_shapes_an_analysis_too(picture: Image.Image) -> None:
    """Types offer them, so each is honoured: a salt keeps answers apart, and the backend is told the rest."""

    class Obliging(TalkingBackend):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, fields=frozenset({"priority", "chat_template_kwargs"}))

    backend = Obliging(reply=answering(answer_json()))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        for salt in ("a", "a", "b"):
            pipe.analyze(picture, cache_salt=salt, priority=-3, chat_template_kwargs={"add_vision_id": True})
    assert [request.cache_salt for request in backend.requests] == ["a", "b"]
    assert {request.priority for request in backend.requests} == {-3}
    assert {tuple(request.chat_template_kwargs.items()) for request in backend.requests} == {(("add_vision_id", True),)}


def test_two_languages_are_two_entries(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering(answer_json()))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        states = [pipe.analyze_result(picture, language=lang).result.cache for lang in ("en", "zh", "en")]
    assert states == ["miss", "miss", "hit"]


def test_confidence_is_null_without_logprobs(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering(answer_json()), logprobs=False)
    with Pipeline(backend=backend, cache="off") as pipe:
        value = pipe.analyze(picture)
    assert value.confidence is None
    assert value.confidence_method is None
    assert value.field_confidence == {}


def test_a_backend_without_schemas_is_prompted_and_the_result_says_so(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering(answer_json()), formats=frozenset())
    with Pipeline(backend=backend, cache="off") as pipe:
        found = pipe.analyze_result(picture)
    assert "attributes" in backend.requests[0].messages[-1].text
    assert any("does not enforce" in note for note in found.result.notes)


@pytest.mark.parametrize(
    "text",
    [
        "```json\n" + answer_json() + "\n```",
        "Sure! Here it is: " + answer_json() + " Anything else?",
        answer_json().replace("}}", "},}"),
        answer_json().replace('"', "'"),
    ],
)
def test_unambiguous_json_is_repaired(picture: Image.Image, text: str) -> None:
    backend = TalkingBackend(reply=answering(text), formats=frozenset())
    with Pipeline(backend=backend, cache="off") as pipe:
        assert pipe.analyze(picture).brand == ANSWER["brand"]
    assert len(backend.requests) == 1


def test_a_bad_answer_is_asked_again_once(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering("no idea", answer_json()))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        found = pipe.analyze_result(picture)
    assert found.value.brand == "NORVIK"
    assert found.result.usage.prompt_tokens == 20
    assert [message.role for message in backend.requests[1].messages][-2:] == ["assistant", "user"]
    assert any("retried once" in note for note in found.result.notes)


def test_a_twice_bad_answer_is_an_error_that_keeps_the_text_and_is_not_cached(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"brand": 3}'))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        for _ in range(2):
            with pytest.raises(AnalysisError) as caught:
                pipe.analyze(picture)
    assert caught.value.raw == '{"brand": 3}'
    assert len(backend.requests) == 4


class Invoice(BaseModel):
    number: str
    total: float


def test_any_pydantic_schema(picture: Image.Image) -> None:
    backend = TalkingBackend(reply=answering('{"number": "A-7", "total": 12.5}'))
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first, again = (pipe.analyze_result(picture, schema=Invoice) for _ in range(2))
        assert pipe.analyze(picture, schema=Invoice) == Invoice(number="A-7", total=12.5)
    assert again.result.cache == "hit"
    assert again.field_confidence == first.field_confidence == {"number": 0.5, "total": 0.5}


def test_a_cut_picture_is_met_in_the_gate_whatever_the_budget(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:4000])
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="off") as pipe, pytest.raises(MediaError):
        pipe.ask(str(path), "q", max_pixels=1_000_000)
    assert backend.requests == []


def test_map_keeps_order_bounds_concurrency_and_survives_bad_items(pictures: list[str], tmp_path: Path) -> None:
    backend = TalkingBackend(reply=answering(answer_json()))
    sources = [*pictures[:5], str(tmp_path / "missing.png"), *pictures[5:]]
    with Pipeline(backend=backend, cache="memory:") as pipe:
        items = list(pipe.map(sources, concurrency=3))
        again = list(pipe.map(sources))
    assert [item.index for item in items] == list(range(13))
    assert [item.source for item in items] == sources
    assert [item.ok for item in items].count(False) == 1
    assert isinstance(items[5].error, MediaError)
    assert backend.most_running <= 3
    assert all(item.result is None or item.result.cache == "hit" for item in again)


def test_map_lets_go_of_pictures_unless_asked(pictures: list[str]) -> None:
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
        assert [len(item.value.pictures) for item in pipe.map(pictures[:2], "q")] == [0, 0]
        assert [len(item.value.pictures) for item in pipe.map(pictures[:2], "q", keep_pictures=True)] == [1, 1]


def test_map_of_one_path_is_not_a_map_of_its_letters(pictures: list[str]) -> None:
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe, pytest.raises(ConfigError, match="several pictures"):
        list(pipe.map(pictures[0]))


def test_map_takes_sources_lazily(pictures: list[str]) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield pictures[0]

    with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
        items = pipe.map(endless(), "q", concurrency=2)
        assert [next(items).index for _ in range(3)] == [0, 1, 2]
        items.close()
    assert taken < 50


def test_usable_inside_a_running_loop(picture: Image.Image) -> None:
    async def main() -> str:
        with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
            return pipe.ask(picture, "q").text

    assert run(main()) == "1:q"


def test_sync_and_async_have_the_same_signatures() -> None:
    def public(cls: type) -> dict[str, Any]:
        return {name: member for name, member in inspect.getmembers(cls, callable) if not name.startswith("_")}

    sync = public(Pipeline)
    verbs = [
        "analyze",
        "analyze_result",
        "ask",
        "chat",
        "decide",
        "locate",
        "map",
        "open",
        "read",
        "stats",
        "stream",
        "stream_chat",
    ]
    assert sorted(set(sync) - {"close"}) == verbs
    for name in [*verbs, "__init__"]:
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (Pipeline, AsyncPipeline))
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), name


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p, i: p.ask(i, "q", temprature=1), ConfigError, "did you mean 'temperature'"),
        (lambda p, i: p.ask(i, "q", temperature=-1), ConfigError, "temperature=-1"),
        (lambda p, i: p.ask(i, "q", temperature="hot"), ConfigError, "wrong type"),
        (lambda p, i: p.ask(i, "q", max_tokens=1.5), ConfigError, "wrong type"),
        (lambda p, i: list(p.map([i], "q", concurrency=-1)), ConfigError, "concurrency"),
        (lambda p, i: p.ask(i, "q", max_pixels=3), ConfigError, "max_pixels=3"),
        (lambda p, i: p.ask("nowhere.png", "q"), MediaError, "nowhere.png"),
        (lambda p, i: p.ask([i] * 9, "q"), UnsupportedInputError, "at most 8"),
        (lambda p, i: p.ask(i, "q", cache="sometimes"), ConfigError, "sometimes"),
        (lambda p, i: p.analyze(i, language="xx"), ConfigError, "xx"),
        (lambda p, i: p.analyze(i, schema=asyncio.Event), ConfigError, "pydantic"),
        (lambda p, i: p.analyze([]), ConfigError, "needs a picture"),
        (lambda p, i: p.chat([]), ConfigError, "at least one message"),
        (lambda p, i: p.chat("hello"), RequestError, "must be a list"),
        (lambda p, i: p.chat([{"role": "robot", "content": "x"}]), RequestError, "robot"),
        (lambda p, i: p.chat([{"role": "user", "content": [{"type": "video_url"}]}]), RequestError, "video_url"),
        (lambda p, i: p.chat([{"role": "user", "content": 7}]), RequestError, "content"),
    ],
)
def test_bad_input_is_one_clear_line(picture: Image.Image, call: Any, error: type, words: str) -> None:
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe, pytest.raises(error) as caught:
        call(pipe, picture)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_set_up_is_refused_at_once() -> None:
    for arguments, words in [
        ({"model": "opnai:x"}, "did you mean 'openai'"),
        ({"model": "local:x", "devise": "npu"}, "did you mean 'device'"),
        ({"backend": TalkingBackend(), "device": "npu"}, "no effect"),
        ({"backend": TalkingBackend(), "cache": "redsi://x"}, "did you mean 'redis'"),
        ({"backend": TalkingBackend(), "concurrency": 0}, "concurrency"),
        ({"backend": TalkingBackend(), "max_pixels": 0}, "max_pixels"),
        ({"backend": TalkingBackend(), "model": "x"}, "has its model"),
        ({"backend": TalkingBackend(), "language": "tlh"}, "tlh"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Pipeline(**arguments)  # type: ignore[arg-type]
        assert words in str(caught.value)


def test_two_pipelines_in_one_process_do_not_know_of_each_other(picture: Image.Image) -> None:
    one, two = TalkingBackend("one"), TalkingBackend("two")
    with Pipeline(backend=one, cache="memory:") as a, Pipeline(backend=two, cache="memory:") as b:
        assert a.ask(picture, "q").cache == b.ask(picture, "q").cache == "miss"
    assert (len(one.requests), len(two.requests)) == (1, 1)


def test_a_result_shows_picture_and_answer_in_a_notebook(picture: Image.Image) -> None:
    with Pipeline(backend=TalkingBackend(reply=lambda _: "<b>red</b>"), cache="off") as pipe:
        html = pipe.ask(picture, "q")._repr_html_()
    assert "data:image/" in html
    assert "&lt;b&gt;red" in html
