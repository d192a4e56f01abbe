"""Each fault an endpoint can have, over a real connection."""

from __future__ import annotations

import contextlib
import email.utils
import socket
import sys
import time
from typing import Any

import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.errors import (
    AuthError,
    BackendResponseError,
    BackendTimeoutError,
    BackendUnavailableError,
    ContextLengthError,
    DeviceMemoryError,
    MediaError,
    QvlError,
    RateLimitError,
    RequestError,
    UnknownNameError,
    UnsupportedInputError,
)
from qvl.testing.asking import ask, collect, idle
from tests.scripted_endpoint import (
    CutOff,
    Echo,
    Events,
    Flood,
    Hang,
    ScriptedAnswer,
    ScriptedEndpoint,
    Stall,
    Status,
    Text,
)

pytestmark = pytest.mark.anyio


def backend_at(endpoint: ScriptedEndpoint, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("echo", base_url=endpoint.url, **{"probe": False, **options})


async def text_after(endpoint: ScriptedEndpoint, *answers: ScriptedAnswer, **options: Any) -> str:
    endpoint.say(*answers)
    async with backend_at(endpoint, **options) as backend:
        text = (await backend.generate(ask("hello there"))).text
        await idle(backend)
    return text


async def error_after(endpoint: ScriptedEndpoint, *answers: ScriptedAnswer, **options: Any) -> QvlError:
    endpoint.say(*answers)
    async with backend_at(endpoint, **options) as backend:
        with pytest.raises(QvlError) as caught:
            await backend.generate(ask("hello there"))
        await idle(backend)
    assert "\n" not in str(caught.value)
    return caught.value


class TestRetries:
    async def test_429_is_asked_again_after_the_time_it_names(self, endpoint: ScriptedEndpoint) -> None:
        soon = email.utils.formatdate(time.time() - 1, usegmt=True)
        headers = [{"Retry-After": "0"}, {"retry-after-ms": "1"}, {"Retry-After": soon}]
        answers = [Status(429, headers=header) for header in headers]
        assert await text_after(endpoint, *answers, max_retries=3) == "hello there"
        assert len(endpoint.chats) == 4

    async def test_500_twice_then_200(self, endpoint: ScriptedEndpoint) -> None:
        assert await text_after(endpoint, Status(500), Status(500)) == "hello there"

    async def test_the_same_body_is_sent_again(self, endpoint: ScriptedEndpoint) -> None:
        await text_after(endpoint, Status(502))
        first, second = endpoint.chats
        assert first.body == second.body

    async def test_503_for_good_gives_up_after_max_retries(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.default = Status(503, {"error": {"message": "still loading"}}, {"retry-after-ms": "1"})
        error = await error_after(endpoint, max_retries=2)
        assert isinstance(error, BackendUnavailableError)
        assert "still loading" in str(error)
        assert endpoint.url in str(error)
        assert len(endpoint.chats) == 3

    async def test_a_connection_closed_without_a_word_is_tried_again(self, endpoint: ScriptedEndpoint) -> None:
        assert await text_after(endpoint, Hang()) == "hello there"

    async def test_a_stream_cut_before_its_first_token_is_tried_again(self, endpoint: ScriptedEndpoint) -> None:
        assert await text_after(endpoint, CutOff(after=1), CutOff(after=0, clean=True)) == "hello there"

    @pytest.mark.parametrize("clean", [True, False])
    async def test_nothing_is_repeated_after_the_first_token(self, endpoint: ScriptedEndpoint, clean: bool) -> None:
        endpoint.say(CutOff(after=2, clean=clean))
        async with backend_at(endpoint) as backend:
            stream = backend.stream(ask("hello there"))
            assert (await anext(stream)).text == "hello"
            with pytest.raises(BackendResponseError, match="broke off"):
                await anext(stream)
        assert len(endpoint.chats) == 1

    async def test_max_retries_0_asks_once(self, endpoint: ScriptedEndpoint) -> None:
        await error_after(endpoint, Status(500), max_retries=0)
        assert len(endpoint.chats) == 1

    async def test_what_the_endpoint_stores_is_not_sent_twice(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Status(500))
        async with backend_at(endpoint) as backend:
            with pytest.raises(BackendResponseError):
                await backend.generate(ask("hello").replace(extra={"store": True}))
            endpoint.say(Status(429, headers={"Retry-After": "0"}))
            await backend.generate(ask("hello").replace(extra={"store": True}))
        assert len(endpoint.chats) == 3

    @pytest.mark.parametrize(
        "answer",
        [
            Status(429, headers={"Retry-After": "86400"}),
            Status(429, {"error": {"message": "pay", "code": "insufficient_quota"}}),
            Status(500, headers={"x-should-retry": "false"}),
            Status(400),
            Status(401),
        ],
    )
    async def test_hopeless_answers_are_not_repeated(self, endpoint: ScriptedEndpoint, answer: Status) -> None:
        await error_after(endpoint, answer)
        assert len(endpoint.chats) == 1

    async def test_retry_after_travels_with_the_error(self, endpoint: ScriptedEndpoint) -> None:
        error = await error_after(endpoint, Status(429, headers={"Retry-After": "86400"}))
        assert isinstance(error, RateLimitError)
        assert error.retry_after == 86400


SHAPES = [
    ({"error": {"message": "broken XYZ", "type": "server_error", "param": None, "code": None}}, 501),
    ({"error": {"message": "broken XYZ", "type": "InternalServerError", "code": 501}}, 501),
    ({"error": "broken XYZ"}, 501),
    ({"object": "error", "message": "broken XYZ", "type": "InternalServerError", "code": 501}, 501),
    ({"detail": "broken XYZ"}, 501),
    ({"detail": [{"loc": ["body", "messages"], "msg": "broken XYZ", "type": "missing"}]}, 501),
    ({"message": "broken XYZ"}, 501),
    ("broken XYZ", 501),
    ("<html><head><style>a{}</style><title>501</title></head><body><h1>broken XYZ</h1></body></html>", 501),
    (b"\xff\xfe broken XYZ", 501),
    ('["broken XYZ"]', 501),
]


class TestErrorBodies:
    @pytest.mark.parametrize(("body", "status"), SHAPES)
    async def test_the_text_is_kept_whatever_the_shape(
        self, endpoint: ScriptedEndpoint, body: Any, status: int
    ) -> None:
        error = await error_after(endpoint, Status(status, body))
        assert isinstance(error, BackendResponseError)
        assert "broken XYZ" in str(error)
        assert "<h1>" not in str(error)

    @pytest.mark.parametrize(
        ("status", "body", "kind"),
        [
            (400, {"error": {"message": "no", "param": "top_p"}}, RequestError),
            (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, ContextLengthError),
            (400, {"object": "error", "message": "maximum context length is 4096", "code": 400}, ContextLengthError),
            (
                422,
                {"detail": [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]},
                UnsupportedInputError,
            ),
            (400, {"error": {"message": "Failed to load image: cannot identify"}}, MediaError),
            (400, {"error": {"message": "Unsupported value", "code": "unsupported_value"}}, UnsupportedInputError),
            (401, {"error": "Unauthorized"}, AuthError),
            (403, "forbidden", AuthError),
            (404, {"error": {"message": "The model `x` does not exist"}}, UnknownNameError),
            (404, {"detail": "Not Found"}, BackendResponseError),
            (405, {"detail": "Method Not Allowed"}, BackendResponseError),
            (413, "too large", RequestError),
            (429, {"error": {"message": "slow down"}}, RateLimitError),
            (500, {"error": {"message": "CUDA out of memory"}}, DeviceMemoryError),
            (502, "<html>Bad Gateway</html>", BackendUnavailableError),
            (504, "gateway timeout", BackendTimeoutError),
        ],
    )
    async def test_each_status_has_its_class(
        self, endpoint: ScriptedEndpoint, status: int, body: Any, kind: type[QvlError]
    ) -> None:
        error = await error_after(endpoint, Status(status, body), max_retries=0)
        assert type(error) is kind

    async def test_the_field_at_fault_is_named(self, endpoint: ScriptedEndpoint) -> None:
        detail = [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]
        assert (await error_after(endpoint, Status(422, {"detail": detail}))).param == "top_k"
        long = {"error": {"message": "x", "code": "context_length_exceeded", "param": "messages"}}
        assert (await error_after(endpoint, Status(400, long))).param == "messages"

    async def test_a_long_text_is_shortened(self, endpoint: ScriptedEndpoint) -> None:
        error = await error_after(endpoint, Status(501, "word " * 10_000))
        assert len(str(error)) < 500


class TestBrokenAnswers:
    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (Status(200, "<html><h1>Welcome</h1></html>"), "expected server-sent events"),
            (Status(200, "hello"), "expected server-sent events"),
            (Status(200, b'{"choices": [{"index": 0, "mess'), "broken JSON"),
            (Status(200, {"detail": "nothing here"}), "nothing here"),
            (Status(200, {"error": "overloaded"}), "overloaded"),
            (Status(200, b""), "without an answer"),
            (Events([]), "without an answer"),
            (Events([], done=False), "without an answer"),
            (Events([b'{"choices": [{"index": 0, "del']), "broken JSON"),
            (Events([b'{"choices": []} {}']), "broken JSON"),
            (Events([b'{"choices": [{"delta": {"content": "\xff\xfe"}}]}']), "not UTF-8"),
            (Events([b"[1, 2]"]), "not an object"),
            (Events([{"choices": [{"delta": {"content": 5}}]}]), "invalid event"),
            (Events([{"choices": "nonsense"}]), "invalid event"),
            (Events([{"error": {"message": "engine died", "code": 500}}]), "engine died"),
            (Events([{"choices": [{"delta": {}, "finish_reason": "parse_error"}]}]), "parse_error"),
            (
                Events([{"choices": [{"delta": {"content": "x"}, "finish_reason": None}]}], done=False),
                "before the answer was",
            ),
        ],
    )
    async def test_nonsense_is_an_error_with_its_words(
        self, endpoint: ScriptedEndpoint, answer: ScriptedAnswer, words: str
    ) -> None:
        error = await error_after(endpoint, answer, max_retries=0)
        assert isinstance(error, BackendResponseError)
        assert words in str(error)

    @pytest.mark.parametrize("status", [200, 500])
    @pytest.mark.parametrize("fill", [b"x", b"data: x", b"{", b'data: {"choices": []}\n\n'])
    async def test_a_body_of_a_gigabyte_ends_early(self, endpoint: ScriptedEndpoint, status: int, fill: bytes) -> None:
        error = await error_after(endpoint, Flood(status=status, fill=fill), max_retries=0)
        assert isinstance(error, BackendResponseError)
        assert len(str(error)) < 1000

    async def test_an_error_in_the_stream_after_some_tokens(self, endpoint: ScriptedEndpoint) -> None:
        token = {"choices": [{"index": 0, "delta": {"content": "he"}}]}
        endpoint.say(Events([token, {"error": {"message": "NPU out of memory", "code": 500}}]))
        async with backend_at(endpoint) as backend:
            with pytest.raises(DeviceMemoryError):
                await collect(backend, ask("hello"))
        assert len(endpoint.chats) == 1

    async def test_fewer_choices_than_asked_for(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Text("only one"))
        async with backend_at(endpoint) as backend:
            with pytest.raises(BackendResponseError, match="n=2"):
                await collect(backend, ask("hello", n=2))


class TestWaiting:
    async def test_no_first_token(self, endpoint: ScriptedEndpoint) -> None:
        error = await error_after(endpoint, Stall(), first_token_timeout=0.2)
        assert isinstance(error, BackendTimeoutError)
        assert "no first token" in str(error)

    async def test_no_next_token(self, endpoint: ScriptedEndpoint) -> None:
        error = await error_after(endpoint, Stall(after=2), token_timeout=0.2)
        assert "no further token" in str(error)

    async def test_the_total_covers_retries(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.default = Status(503, headers={"Retry-After": "5"})
        error = await error_after(endpoint, total_timeout=0.5, max_retries=50)
        assert isinstance(error, BackendUnavailableError)
        assert len(endpoint.chats) == 1

    async def test_the_total_covers_an_answer_that_was_cut_off_and_the_one_that_replaces_it(
        self, endpoint: ScriptedEndpoint
    ) -> None:
        """Each of the two would be in time."""
        endpoint.say(CutOff(after=4, pause=0.3), Echo(pause=0.3))
        async with backend_at(endpoint, total_timeout=2.4) as backend:
            with pytest.raises(BackendTimeoutError):
                await backend.generate(ask("one two three"))
        assert len(endpoint.chats) == 2

    async def test_leaving_a_stream_ends_the_work_at_the_endpoint(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Stall(after=3))
        async with backend_at(endpoint) as backend:
            stream = backend.stream(ask("hello there"))
            await anext(stream)
            await stream.aclose()
            assert backend.stats()["num_running"] == 0


class TestNoConnection:
    async def test_nothing_listens(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.stop()
        error = await error_after(endpoint, max_retries=0)
        assert isinstance(error, BackendUnavailableError)
        assert endpoint.url in str(error)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse what does not fit into the backlog")
    async def test_a_host_that_does_not_take_the_connection(self) -> None:
        with contextlib.ExitStack() as stack:
            deaf = stack.enter_context(socket.socket())
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            # What does not fit into the backlog is left without an answer, as by a firewall that drops.
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(deaf.getsockname())
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            async with OpenAIBackend("m", base_url=url, probe=False, connect_timeout=0.2, max_retries=0) as backend:
                with pytest.raises(BackendUnavailableError, match="connect_timeout"):
                    await backend.generate(ask("hello"))

    async def test_tls_that_fails(self, endpoint: ScriptedEndpoint) -> None:
        url = endpoint.url.replace("http://", "https://")
        async with OpenAIBackend("echo", base_url=url, probe=False) as backend:
            with pytest.raises(BackendUnavailableError, match="TLS"):
                await backend.generate(ask("hello"))

    async def test_a_name_that_does_not_resolve(self) -> None:
        backend = OpenAIBackend("echo", base_url="http://nowhere.invalid/v1", probe=False, max_retries=0)
        async with backend:
            with pytest.raises(BackendUnavailableError, match=r"nowhere\.invalid"):
                await backend.generate(ask("hello"))

    async def test_opening_names_the_url_that_is_dead(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.stop()
        with pytest.raises(BackendUnavailableError, match=endpoint.url):
            await backend_at(endpoint, probe=True).open()
