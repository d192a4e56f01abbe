"""The two ways to an endpoint: straight, and through the openai client where the straight one does not lead there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.transport import goes_straight
from qvl.errors import (
    BackendResponseError,
    BackendTimeoutError,
    BackendUnavailableError,
    ConfigError,
    RateLimitError,
    RequestError,
)
from qvl.testing.asking import ask, collect, idle
from tests.scripted_endpoint import (
    CutOff,
    Flood,
    Hang,
    ScriptedAnswer,
    ScriptedEndpoint,
    ScriptedExchange,
    Stall,
    Status,
    Text,
)

pytestmark = pytest.mark.anyio
Way = Callable[[ScriptedEndpoint], str]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def backend_at(url: str, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("echo", base_url=url, **{"probe": False, **options})


def through_the_client(endpoint: ScriptedEndpoint) -> str:
    """A base URL that only the openai client can use: it has a user in it."""
    return endpoint.url.replace("http://", "http://shop:secret@")


@dataclass(frozen=True, slots=True)
class Compressed:
    """An answer of two events that is compressed although nobody asked for that, flushed after each."""

    encoding: str
    window: int
    chunked: bool = True
    status: int = 200

    async def __call__(self, exchange: ScriptedExchange) -> None:
        packer = zlib.compressobj(wbits=self.window)
        choices = [{"delta": {"content": "one"}}, {"delta": {"content": " two"}, "finish_reason": "stop"}]
        lines = [b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() for choice in choices]
        lines = [*lines, b"data: [DONE]"] if self.status == 200 else [b'{"error": {"message": "broken XYZ"}}']
        pieces = [packer.compress(line + b"\n\n") + packer.flush(zlib.Z_SYNC_FLUSH) for line in lines]
        pieces.append(packer.flush())
        length = {} if self.chunked else {"Content-Length": str(sum(map(len, pieces)))}
        await exchange.head(self.status, {"Content-Encoding": self.encoding, **length}, chunked=self.chunked)
        for piece in pieces:
            await exchange.send(piece)


class Trickle:
    """An error whose text comes letter by letter and never ends."""

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await exchange.head(503)
        while True:
            await exchange.send(b"x")
            await asyncio.sleep(0.05)


class TestWhichWay:
    async def test_the_straight_way_says_what_the_client_would(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_ORG_ID", "org-shoes")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-shoes")
        for url in (endpoint.url, through_the_client(endpoint)):
            async with backend_at(url, api_key="sesame", extra_headers={"X-Shop": "1"}) as backend:
                await backend.generate(ask("hello").replace(request_id="shop-42"))
        straight, client = (received.headers for received in endpoint.chats)
        same = ("host", "content-type", "user-agent", "openai-organization", "openai-project", "x-shop", "x-request-id")
        assert {name: straight[name] for name in same} == {name: client[name] for name in same}
        assert straight["authorization"] == "Bearer sesame"
        assert endpoint.chats[0].body == endpoint.chats[1].body

    async def test_a_proxy_is_used_where_one_is_named(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
        async with backend_at("http://model.invalid/v1") as backend:
            assert (await backend.generate(ask("hello"))).text == "hello"
        assert endpoint.chats[0].path == "http://model.invalid/v1/chat/completions"

    @pytest.mark.parametrize(
        ("proxy", "exempt", "url", "straight"),
        [
            (None, None, "http://a:8000/v1", True),
            ("http://proxy:3128", None, "http://a:8000/v1", False),
            ("http://proxy:3128", "a", "http://a:8000/v1", True),
            ("http://proxy:3128", "b", "http://a:8000/v1", False),
            ("http://proxy:3128", None, "https://a/v1", True),
            (None, None, "http://user:word@a:8000/v1", False),
            (None, None, "http://a/v1?version=2", True),
        ],
    )
    async def test_the_environment_decides(
        self, proxy: str | None, exempt: str | None, url: str, straight: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if proxy is not None:
            monkeypatch.setenv("HTTP_PROXY", proxy)
        if exempt is not None:
            monkeypatch.setenv("NO_PROXY", exempt)
        assert goes_straight(url) is straight

    @pytest.mark.parametrize("straight", [True, False])
    @pytest.mark.parametrize("end", ["", "/"])
    async def test_a_query_stands_behind_every_path(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, straight: bool, end: str
    ) -> None:
        host = endpoint.url.removesuffix("/v1")
        if not straight:
            monkeypatch.setenv("HTTP_PROXY", host)
            host = "http://model.invalid"
        async with backend_at(f"{host}/deployments/m{end}?api-version=2024-10-21&tag=a%20b") as backend:
            await backend.generate(ask("hello"))
            await backend.check()
            assert "2024" not in str(backend.endpoints())
        paths = [one.path.removeprefix("http://model.invalid").replace("%20", "+") for one in endpoint.requests]
        assert "/deployments/m/chat/completions?api-version=2024-10-21&tag=a+b" in paths
        assert "/deployments/m/models?api-version=2024-10-21&tag=a+b" in paths

    async def test_two_queries_are_two_identities(self, endpoint: ScriptedEndpoint) -> None:
        found = [backend_at(f"{endpoint.url}{query}").identity() for query in ("", "?of=a", "?of=b")]
        assert len({str(identity) for identity in found}) == 3
        assert "of=" not in str(found)

    @pytest.mark.parametrize("straight", [True, False])
    async def test_a_name_may_stand_twice_in_a_query(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, straight: bool
    ) -> None:
        host = endpoint.url.removesuffix("/v1")
        if not straight:
            monkeypatch.setenv("HTTP_PROXY", host)
            host = "http://model.invalid"
        async with backend_at(f"{host}/v1?a=1&b=x,y&a=2") as backend:
            await backend.generate(ask("hello"))
        path = endpoint.chats[0].path.removeprefix("http://model.invalid").replace("%2C", ",")
        assert path == "/v1/chat/completions?a=1&b=x,y&a=2"

    @pytest.mark.parametrize("query", ["?models=a,b", "?models=a,b&x=,c"])
    async def test_a_comma_in_a_query_belongs_to_it(self, endpoint: ScriptedEndpoint, query: str) -> None:
        found = backend_at(f"{endpoint.url}{query}, https://b/v1,").endpoints()
        assert [state.url.partition("#")[0] for state in found] == [endpoint.url, "https://b/v1"]
        async with backend_at(f"{endpoint.url}{query}") as backend:
            await backend.generate(ask("hello"))
        assert endpoint.chats[0].path == f"/v1/chat/completions{query}"
        with pytest.raises(ConfigError, match="invalid endpoint URL 'b:8000/v1'"):
            backend_at(f"{endpoint.url},b:8000/v1")

    async def test_endpoints_that_differ_in_their_query_are_two(self, endpoint: ScriptedEndpoint) -> None:
        urls = [f"{endpoint.url}?deployment={name}" for name in ("one", "two")]
        async with backend_at(urls, weights={urls[0]: 1.0, urls[1]: 3.0}) as backend:
            for _ in range(8):
                await backend.generate(ask("hello"))
            assert len(backend.endpoints()) == 2
            assert "deployment" not in str(backend.endpoints())
        assert {one.path.partition("?")[2] for one in endpoint.chats} == {"deployment=one", "deployment=two"}
        with pytest.raises(ConfigError, match="duplicate endpoint"):
            backend_at([urls[0], urls[0]])

    @pytest.mark.parametrize(
        "proxy", ["socks5://user:word@127.0.0.1:1", "gopher://127.0.0.1:1", "http://user:word@x:notaport"]
    )
    async def test_a_proxy_that_cannot_be_used_matters_only_where_it_is_needed(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, proxy: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv("ALL_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        async with backend_at(endpoint.url) as backend:
            assert (await backend.generate(ask("hello"))).text == "hello"
        monkeypatch.setenv("NO_PROXY", "example.org")
        with pytest.raises(ConfigError, match=r"ALL_PROXY=.*NO_PROXY") as caught:
            await backend_at(endpoint.url).open()
        assert "word" not in str(caught.value)

    async def test_a_proxy_of_its_own_is_used_beside_one_that_cannot_be(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
        monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
        async with backend_at("http://model.invalid/v1") as backend:
            assert (await backend.generate(ask("hello"))).text == "hello"
        assert endpoint.chats[0].path == "http://model.invalid/v1/chat/completions"
        with pytest.raises(ConfigError, match=r"ALL_PROXY=socks5://127.0.0.1:1 ") as caught:
            await backend_at("https://model.invalid/v1").open()
        assert "HTTP_PROXY" not in str(caught.value)

    async def test_a_redirect_is_followed(self, endpoint: ScriptedEndpoint) -> None:
        with ScriptedEndpoint() as elsewhere:
            moved = Status(307, {}, {"Location": f"{elsewhere.url}/chat/completions"})
            endpoint.say(moved, moved, moved)
            async with backend_at(endpoint.url) as backend:
                for _ in range(2):
                    assert (await backend.generate(ask("hello there"))).text == "hello there"
            assert len(elsewhere.chats) == 2
            # Once straight and then through the client; from then on through the client alone.
            assert len(endpoint.chats) == 3

    @pytest.mark.parametrize("chunked", [True, False])
    @pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("x-gzip", 31), ("deflate", 15), ("Deflate", -15)])
    async def test_a_compressed_answer_is_read_and_not_asked_for_again(
        self, endpoint: ScriptedEndpoint, encoding: str, window: int, chunked: bool
    ) -> None:
        endpoint.say(Compressed(encoding, window, chunked), Compressed(encoding, window, chunked, status=400))
        async with backend_at(endpoint.url) as backend:
            assert (await backend.generate(ask("x"))).text == "one two"
            with pytest.raises(RequestError, match="broken XYZ"):
                await backend.generate(ask("x"))
        assert (len(endpoint.chats), endpoint.connections) == (2, 1)

    @pytest.mark.parametrize(
        ("encoding", "window", "words"),
        [("br", 31, "'br'"), ("zstd", 31, "'zstd'"), ("gzip, br", 31, "'gzip, br'"), ("gzip", 15, "not gzip")],
    )
    async def test_a_compression_that_cannot_be_read_is_said_once(
        self, endpoint: ScriptedEndpoint, encoding: str, window: int, words: str
    ) -> None:
        endpoint.say(Compressed(encoding, window), Compressed(encoding, window, status=400))
        async with backend_at(endpoint.url) as backend:
            with pytest.raises(BackendResponseError, match=words):
                await backend.generate(ask("x"))
            with pytest.raises(RequestError, match="400"):
                await backend.generate(ask("x"))
        assert len(endpoint.chats) == 2

    @pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "schlüssel\N{SNOWMAN}"])
    async def test_what_no_header_can_carry_is_refused(self, key: str, endpoint: ScriptedEndpoint) -> None:
        with pytest.raises(ConfigError, match="header"):
            await backend_at(endpoint.url, api_key=key).open()

    async def test_a_request_id_that_no_header_can_carry_stays_here(self, endpoint: ScriptedEndpoint) -> None:
        for url in (endpoint.url, through_the_client(endpoint)):
            async with backend_at(url) as backend:
                await backend.generate(ask("x").replace(request_id="a\r\nX-Evil: 1"))
        assert not any({"x-request-id", "x-evil"} & received.headers.keys() for received in endpoint.chats)


class TestThroughTheClient:
    """The faults of test_faults that end in the transport, on the other one."""

    @pytest.mark.parametrize(
        ("answer", "options", "kind", "words"),
        [
            (Status(429, headers={"Retry-After": "7"}), {}, RateLimitError, "scripted"),
            (Hang(), {}, BackendUnavailableError, "broke off"),
            (CutOff(after=2), {}, BackendResponseError, "broke off"),
            (Stall(), {"first_token_timeout": 0.2}, BackendTimeoutError, "no first token"),
            (Stall(after=2), {"token_timeout": 0.2}, BackendTimeoutError, "no further token"),
            (Flood(fill=b"data: x"), {}, BackendResponseError, "in one piece"),
            (Flood(status=500, fill=b"x"), {}, BackendResponseError, "500"),
        ],
    )
    async def test_faults(
        self,
        endpoint: ScriptedEndpoint,
        answer: ScriptedAnswer,
        options: dict[str, Any],
        kind: type[Exception],
        words: str,
    ) -> None:
        endpoint.say(answer, answer)
        async with backend_at(through_the_client(endpoint), max_retries=0, **options) as backend:
            with pytest.raises(kind, match=words) as caught:
                await collect(backend, ask("hello there"))
            await idle(backend)
        assert "secret" not in str(caught.value)

    async def test_nothing_listens(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.stop()
        async with backend_at(through_the_client(endpoint), max_retries=0) as backend:
            with pytest.raises(BackendUnavailableError, match="cannot connect"):
                await backend.generate(ask("hello"))


@pytest.mark.parametrize("way", [lambda endpoint: endpoint.url, through_the_client], ids=["straight", "client"])
class TestBothWays:
    async def test_aclose_ends_a_request_that_waits(self, way: Way, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Stall())
        backend = backend_at(way(endpoint))
        await backend.open()
        waiting = asyncio.ensure_future(backend.generate(ask("hello")))
        while not endpoint.chats:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(backend.aclose(), 5)
        with pytest.raises(BackendUnavailableError, match="closed"):
            await waiting

    async def test_an_error_whose_text_never_ends_is_an_error(self, way: Way, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Trickle())
        async with backend_at(way(endpoint), max_retries=0, first_token_timeout=250.0) as backend:
            with pytest.raises(BackendUnavailableError, match="503: xx"):
                await backend.generate(ask("hello"))


class TestConnections:
    async def test_one_that_was_closed_meanwhile_costs_no_request(self, endpoint: ScriptedEndpoint) -> None:
        async with backend_at(endpoint.url, max_retries=0) as backend:
            await backend.generate(ask("one"))
            endpoint.stop()
            endpoint.start()
            await asyncio.sleep(0.05)
            assert (await backend.generate(ask("two"))).text == "two"

    async def test_one_that_is_closed_as_the_request_comes_is_not_held_against_the_endpoint(
        self, endpoint: ScriptedEndpoint
    ) -> None:
        endpoint.say(Text("one"), Text("two"), Hang())
        async with backend_at(endpoint.url, max_retries=0) as backend:
            together = await asyncio.gather(*(backend.generate(ask(word)) for word in "ab"))
            assert {result.text for result in together} == {"one", "two"}
            assert (await backend.generate(ask("three"))).text == "three"
            assert backend.endpoints()[0].failures == 0
        # The other idle connection went the same way, as far as one can know.
        assert (len(endpoint.chats), endpoint.connections) == (4, 3)

    async def test_a_list_of_models_is_asked_for_again_on_a_new_connection(self) -> None:
        """A server that hangs up on the second request of every connection."""
        body = b'{"data": [{"id": "echo"}]}'
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        serving: list[asyncio.Task[None] | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            serving.append(asyncio.current_task())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, backend_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as backend:
            for _ in range(3):
                assert [(state.state, state.failures) for state in await backend.check()] == [("up", 0)]
        await asyncio.gather(*filter(None, serving))
        assert len(serving) == 3

    async def test_one_that_may_have_carried_what_is_stored_is_an_error_but_no_blame(
        self, endpoint: ScriptedEndpoint
    ) -> None:
        endpoint.say(Text("one"), Hang())
        async with backend_at(endpoint.url) as backend:
            await backend.generate(ask("one"))
            with pytest.raises(BackendUnavailableError, match="broke off"):
                await backend.generate(ask("two").replace(extra={"store": True}))
            assert backend.endpoints()[0].state == "up"
        assert len(endpoint.chats) == 2

    async def test_leaving_a_stream_ends_the_connection(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Stall(after=2))
        async with backend_at(endpoint.url) as backend:
            stream = backend.stream(ask("hello there"))
            await anext(stream)
            await stream.aclose()
            await backend.generate(ask("x"))
        assert endpoint.connections == 2

    async def test_closing_also_ends_what_began_before_a_redirect(self, endpoint: ScriptedEndpoint) -> None:
        backend = backend_at(endpoint.url)
        await backend.open()
        endpoint.say(Stall(after=2), Status(307, {}, {"Location": "/elsewhere"}), Status(400, {}))
        stream = backend.stream(ask("hello there"))
        await anext(stream)
        with pytest.raises(RequestError):
            await backend.generate(ask("x"))
        await backend.aclose()
        with pytest.raises(BackendUnavailableError, match="closed"):
            await asyncio.wait_for(collect_rest(stream), 5)

    async def test_tls_is_checked_against_the_name(self, tmp_path: Path, certificate: Callable[[str], Path]) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate("localhost"))
        with ScriptedEndpoint(tls=server) as endpoint:
            good = endpoint.url.replace("127.0.0.1", "localhost")
            async with backend_at(good, verify=str(certificate("localhost"))) as backend:
                assert (await backend.generate(ask("hi"))).text == "hi"
            for url, verify in ((good, True), (endpoint.url, str(certificate("localhost")))):
                async with backend_at(url, verify=verify, max_retries=0) as backend:
                    with pytest.raises(BackendUnavailableError, match="TLS"):
                        await backend.generate(ask("hi"))
            async with backend_at(endpoint.url, verify=False) as backend:
                assert (await backend.generate(ask("hi"))).text == "hi"

    async def test_text_of_any_script_arrives(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Text("红色的鞋 \N{ATHLETIC SHOE}"))
        async with backend_at(endpoint.url) as backend:
            assert (await backend.generate(ask("颜色？ \ud800"))).text == "红色的鞋 \N{ATHLETIC SHOE}"
        assert endpoint.chats[0].body["messages"][0]["content"] == "颜色？ \ud800"


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a certificate for a name, key and all in one file."""
    import shutil
    import subprocess

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.pem"
        if not path.exists():
            command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
            arguments = [*command.split(), "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
            subprocess.run([*arguments, "-keyout", tmp_path / "key", "-out", path], check=True, capture_output=True)
            path.write_bytes(path.read_bytes() + (tmp_path / "key").read_bytes())
        return path

    return make


async def collect_rest(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]
