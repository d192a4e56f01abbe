"""The application inside another, plugins' routes, the canary, and work that must not hold up the loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import uvicorn
from fastapi import FastAPI

from qvl.errors import BackendResponseError
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.plugins.hookspecs import hookimpl
from qvl.server import ServerSettings, create_app
from tests.server.conftest import data_url, question
from tests.server.echo_backend import EchoBackend
from tests.server.test_load import until

CHAT = "/v1/chat/completions"


class ShopRoutes:
    """A plugin that adds an address."""

    @hookimpl
    def register_routes(self, app: FastAPI, pipeline: AsyncPipeline) -> None:
        @app.get("/shop/{number}")
        async def shop(number: int) -> dict[str, int]:
            return {"number": number}


class Mounted:
    """Our application below /vl of somebody else's."""

    def __init__(self) -> None:
        self.backend = EchoBackend()
        pipeline = AsyncPipeline(backend=self.backend, cache="memory:", plugins=[ShopRoutes()])
        self.inner = create_app(pipeline, ServerSettings(canary=False, api_keys=("sesame",)))
        outer = FastAPI()
        outer.get("/own")(lambda: "mine")
        outer.mount("/vl", self.inner)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(outer, log_config=None))
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]), daemon=True)

    def __enter__(self) -> Mounted:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()


def test_the_application_can_be_mounted_in_another() -> None:
    with Mounted() as mounted, httpx.Client(base_url=mounted.url, timeout=30, trust_env=False) as client:
        key = {"Authorization": "Bearer sesame"}
        assert client.get("/own").json() == "mine"
        assert client.post(f"/vl{CHAT}", json=question()).status_code == 401
        until(lambda: client.get("/vl/ready", headers=key).status_code == 200)
        answer = client.post(f"/vl{CHAT}", json=question("x", data_url("blue")), headers=key)
        assert answer.json()["choices"][0]["message"]["content"] == "blue 64x64, x"
        again = client.post(f"/vl{CHAT}", json=question("x", data_url("blue")) | {"stream": True}, headers=key)
        assert again.headers["x-qvl-cache"] == "hit"
        assert client.get("/vl/health").status_code == 200
        assert client.get("/vl/").text.startswith("<!doctype html>")
        missing = client.get("/vl/nope", headers=key)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_routes_of_plugins_have_our_keys_and_our_errors() -> None:
    with Mounted() as mounted, httpx.Client(base_url=f"{mounted.url}/vl", timeout=30, trust_env=False) as client:
        assert client.get("/shop/3").status_code == 401
        client.headers["Authorization"] = "Bearer sesame"
        assert client.get("/shop/3").json() == {"number": 3}
        wrong = client.get("/shop/three")
        error = wrong.json()["error"]
        assert (wrong.status_code, error["type"], error["code"]) == (422, "invalid_request_error", "invalid_value")
        assert error["param"] == "path.number"
        assert client.post("/shop/3", json={}).status_code == 405
        assert "/shop/{number}" in client.get("/openapi.json").json()["paths"]


class BlindBackend(EchoBackend):
    """Cannot see for a while."""

    blind = True

    async def stream(self, request):
        if self.blind and request.pictures:
            raise BackendResponseError("no picture tower")
        async for chunk in super().stream(request):
            yield chunk


def test_a_server_whose_first_picture_fails_is_not_ready_until_one_succeeds(serve) -> None:
    server = serve(BlindBackend(), wait=False, canary=True)
    until(lambda: "canary request failed" in server.get("/ready").json().get("reason", ""))
    assert server.get("/ready").status_code == 503
    assert "no picture tower" in server.get("/ready").json()["reason"]
    server.backend.blind = False
    assert server.post(CHAT, question("x", data_url())).status_code == 200
    assert server.get("/ready").status_code == 200


class LoopWatcher(EchoBackend):
    """Notes on which threads pictures are decoded."""

    async def open(self) -> None:
        self.loop_thread = threading.get_ident()
        self.decoders: set[int] = set()
        self.loop = asyncio.get_running_loop()


def test_pictures_are_decoded_beside_the_loop(serve, monkeypatch) -> None:
    from qvl.media import pixels

    backend = LoopWatcher()
    decode = pixels.decode
    held = threading.Event()

    def watched(*args):
        backend.decoders.add(threading.get_ident())
        assert held.wait(30)
        return decode(*args)

    monkeypatch.setattr(pixels, "decode", watched)
    server = serve(backend)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, CHAT, question(f"{n}", data_url("red", (600, 500)))) for n in range(8)]
        until(lambda: backend.decoders)
        # While pictures are being decoded, and not one is done, everybody else is served.
        assert server.post(CHAT, question("text alone")).status_code == 200
        assert server.get("/health").status_code == 200
        assert not any(one.done() for one in asked)
        held.set()
        assert [one.result().status_code for one in asked] == [200] * 8
    assert backend.loop_thread not in backend.decoders
