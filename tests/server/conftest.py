"""A real uvicorn on a free port, in a thread, over an in-process model."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from qvl.backends.base import Backend
from qvl.errors import QvlError
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.server.app import create_app
from qvl.server.run_uvicorn import GracefulServer, bind, make_server, run_server
from qvl.server.settings import ServerSettings
from qvl.server.state import ServerCore
from tests.scripted_endpoint import ScriptedEndpoint
from tests.server.echo_backend import EchoBackend
from tests.server.processes import Process, launch


@dataclass
class Running:
    """A server under test."""

    url: str
    port: int
    core: ServerCore
    backend: Any
    server: GracefulServer
    thread: threading.Thread

    def client(self, **options: Any) -> httpx.Client:
        # Reading the authorities that a client would trust takes longer than most requests.
        return httpx.Client(**{"base_url": self.url, "timeout": 30, "trust_env": False, "verify": False} | options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def get(self, path: str, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def metric(self, name: str) -> float:
        """The sum over all labels of a series."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def start(
    backend: Backend | None = None,
    cache: Any = "memory:",
    wait: bool = True,
    header_timeout: float = 10.0,
    tracer_provider: Any = None,
    tls: tuple[str, str] | None = None,
    calibration: Any = None,
    abstain: Any = None,
    **settings: Any,
) -> Running:
    listener = bind("127.0.0.1", 0)
    backend = backend or EchoBackend()
    settings.setdefault("canary", False)
    pipeline = AsyncPipeline(backend=backend, cache=cache, calibration=calibration, abstain=abstain)
    app = create_app(pipeline, ServerSettings(**settings), tracer_provider=tracer_provider)
    cert, key = tls or (None, None)
    server = make_server(app, header_timeout=header_timeout, tls_cert=cert, tls_key=key)

    def run() -> None:
        # What ends the server early is in server.failure, where the test looks.
        with contextlib.suppress(QvlError):
            run_server(server, listener)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", port, app.state.core, backend, server, thread)
    if wait:
        with running.client() as client:
            key = {"Authorization": f"Bearer {settings['api_keys'][0]}"} if settings.get("api_keys") else {}
            end = time.monotonic() + 120
            # One that is loaded and not ready stays so; loading takes a busy machine a while.
            while client.get("/ready", headers=key).status_code != 200 and not running.core.readiness.settled.is_set():
                assert time.monotonic() < end, "the model was never loaded"
                time.sleep(0.01)
    return running


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test."""
    started: list[Running] = []

    def make(*args: Any, **options: Any) -> Running:
        started.append(start(*args, **options))
        return started[-1]

    yield make
    for running in started:
        running.stop()


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as found:
        yield found


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    """Starts `qvl-serve` processes that end with the test."""
    started: list[Process] = []

    def make(*args: str, **env: str) -> Process:
        started.append(launch(*args, **env))
        return started[-1]

    yield make
    for process in started:
        process.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests of a module that change nothing in it."""
    running = start(batch_dir=tmp_path_factory.mktemp("server") / "batches")
    yield running
    running.stop()


def picture(colour: str = "red", size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, form)
    return held.getvalue()


def data_url(colour: str = "red", size: tuple[int, int] = (64, 64), form: str = "PNG") -> str:
    return data_url_of(picture(colour, size, form), f"image/{form.lower()}")


def data_url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def question(text: str = "hello world", *pictures: str) -> dict[str, Any]:
    """A chat body: the pictures first, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}
