"""Requests a second through `qvl-serve`, LiteLLM's proxy, and nothing, in front of the same trivial upstream.

    python benchmarks/bench_server.py [--seconds 5] [--litellm-venv FOLDER] [--skip-litellm]

Needs `wrk`. LiteLLM is installed into a virtual environment of its own, because it pins other versions. Beside requests
a second by the clock, requests for each second of CPU time of the server are given, which other work on the machine
disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "bench",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}
DELTAS = (
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "ok"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": ANSWER["usage"]},
)
CHUNK = {"id": "c", "created": 1, "model": "bench", "object": "chat.completion.chunk"}
CLIENTS = (1, 16, 64)
# Its own advice for production; and it ends at once where nobody needs a key, but here
# none of the servers asks for one.
LITELLM = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
QUESTION = {"model": "bench", "messages": [{"role": "user", "content": "What colour is the shoe?"}]}


def response(body: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Upstream(asyncio.Protocol):
    """The least that OpenAI's clients accept as an endpoint."""

    lines = (*(json.dumps(CHUNK | delta) for delta in DELTAS), "[DONE]")
    events = response("".join(f"data: {line}\n\n" for line in lines).encode(), "text/event-stream")
    whole = response(json.dumps(ANSWER).encode(), "application/json")
    models = response(
        json.dumps({"object": "list", "data": [{"id": "bench", "object": "model", "created": 1}]}).encode(),
        "application/json",
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.begin()

    def begin(self) -> None:
        self.head, self.body, self.length = b"", bytearray(), -1

    def data_received(self, data: bytes) -> None:
        # Megabytes are looked at once: this must not be what is measured.
        while data:
            if self.length < 0:
                self.head += data
                end = self.head.find(b"\r\n\r\n")
                if end < 0:
                    return
                data, self.head = self.head[end + 4 :], self.head[:end].lower()
                figures = re.search(rb"content-length: *(\d+)", self.head)
                self.length = int(figures[1]) if figures else 0
            missing = self.length - len(self.body)
            self.body += data[:missing]
            data = data[missing:]
            if len(self.body) < self.length:
                return
            ends = self.body[:1000] + self.body[-1000:]
            streamed = b'"stream":true' in ends.replace(b" ", b"")
            listed = self.head.startswith(b"get")
            self.transport.write(self.models if listed else self.events if streamed else self.whole)
            self.begin()


async def serve_upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, path: str, log: Path) -> Iterator[subprocess.Popen]:
    """A server process, once it answers at `path`."""
    environment = {**os.environ, "OPENAI_API_KEY": "none", **LITELLM}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            for _ in range(1200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"{command[0]} ended:\n{log.read_text()[-2000:]}") from None
                    time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, clients: int, seconds: int, pid: int, folder: Path) -> dict[str, float]:
    script = folder / "post.lua"
    body = json.dumps(QUESTION).replace("'", "\\'")
    script.write_text(f"wrk.method='POST'\nwrk.headers['Content-Type']='application/json'\nwrk.body='{body}'\n")
    before = cpu_seconds(pid)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "--latency", "-s", str(script), url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = cpu_seconds(pid) - before
    if "Non-2xx" in output:
        print(f"warning: {re.search(r'Non-2xx.*', output)[0]}", file=sys.stderr)
    count = int(re.search(r"(\d+) requests in", output)[1])
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    rank = {p: float(v) * units[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", output)}
    return {
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1]),
        "p50": rank["50"],
        "p99": rank["99"],
        "per_cpu_second": count / max(used, 0.01),
    }


def litellm_command(folder: Path, upstream: int, port: int, work: Path) -> list[str]:
    python = folder / "bin" / "python"
    if not (folder / "bin" / "litellm").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "litellm[proxy]"], check=True)
    config = work / "litellm.yaml"
    settings = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "bench", "litellm_params": settings}]}))
    return [str(folder / "bin" / "litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--litellm-venv", type=Path, default=Path(tempfile.gettempdir()) / "qvl-bench-litellm")
    parser.add_argument("--skip-litellm", action="store_true")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.upstream:
        asyncio.run(serve_upstream(arguments.upstream))
        return
    if shutil.which("wrk") is None:
        raise SystemExit("bench_server needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), arguments)


def compare(work: Path, arguments: argparse.Namespace) -> None:
    """Runs every server in turn and prints the table."""
    upstream = free_port()
    this = [sys.executable, str(Path(__file__).resolve()), "--upstream", str(upstream)]
    print("| in front | clients | requests/s | p50 ms | p99 ms | requests per CPU second |\n|---|---|---|---|---|---|")

    def row(name: str, port: int, pid: int) -> None:
        measure(port, 4, 1, pid, work)
        for clients in CLIENTS:
            figures = measure(port, clients, arguments.seconds, pid, work)
            print(
                f"| {name} | {clients} | {figures['rate']:.0f} | {figures['p50']:.1f} | {figures['p99']:.1f} "
                f"| {figures['per_cpu_second']:.0f} |",
                flush=True,
            )

    with running(this, upstream, "/v1/models", work / "upstream.log") as process:
        row("nothing", upstream, process.pid)
        if not arguments.skip_litellm:
            port = free_port()
            command = litellm_command(arguments.litellm_venv, upstream, port, work)
            with running(command, port, "/health/liveliness", work / "litellm.log") as process:
                row("LiteLLM proxy", port, process.pid)
        base = [sys.executable, "-m", "qvl.cli.serve", "openai:bench", "--base-url", f"http://127.0.0.1:{upstream}/v1"]
        for name, cache in (
            ("qvl-serve, cache off", "off"),
            ("qvl-serve, hits from memory", "memory:"),
            ("qvl-serve, hits from SQLite", f"sqlite:///{work / 'cache.db'}"),
        ):
            port = free_port()
            command = [*base, "--port", str(port), "--cache", cache]
            with running(command, port, "/ready", work / "qvl.log") as process:
                row(name, port, process.pid)


if __name__ == "__main__":
    main()
