"""The most requests/s of one `qvl bench` process, against a canned streaming endpoint in a separate process.

    python benchmarks/load_client.py [--requests 20000] [--clients 64] [--rate R] [--library qvl|httpx]

Prints requests/s by the clock, the processor time of the client for one request (on a machine that others use, it says
what a free core would do), and the client's peak memory, which must not grow with the number of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PIECES = 8


def canned() -> bytes:
    events: list[Any] = [{"choices": [{"index": 0, "delta": {"content": f"word{n} "}}]} for n in range(PIECES)]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": PIECES}})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%s\r\n" % (len(line), line.encode()) for line in lines) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + body


class Canned(asyncio.Protocol):
    """Answers every whole request with the same stream."""

    answer = canned()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            position = head.find(b"content-length:")
            length = int(head[position + 15 :].split(b"\r\n")[0]) if position >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.transport.write(self.answer)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def with_qvl(url: str, requests: int, clients: int, rate: float | None) -> None:
    from qvl.bench.dataset import Files
    from qvl.bench.plan import LoadPlan
    from qvl.bench.run import Run, Target

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w") as lines:
            lines.writelines(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(requests))
        plan = LoadPlan(concurrency=clients, rate=rate)
        began, spent = time.perf_counter(), cpu()
        run = Run(Target((url,), model="m"), Files([str(data)]), plan, Path(folder) / "run", on_record=count)
        summary = run.work()
    figures = summary.data["endpoints"][0]
    assert figures["requests"]["ok"] == requests, figures["errors"]
    tell(requests, LAST[0] - began, LAST[1] - spent)
    print(f"steady part: {figures['throughput']['requests_per_second']:,.0f} requests/s")


LAST = [0.0, 0.0]


def count(record: object) -> None:
    LAST[:] = time.perf_counter(), cpu()


def with_httpx(url: str, requests: int, clients: int) -> None:
    import httpx

    async def work() -> None:
        todo = iter(range(requests))
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "q"}], "stream": True}).encode()
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as session:

            async def client() -> None:
                for _ in todo:
                    async with session.stream("POST", f"{url}/chat/completions", content=body) as response:
                        async for line in response.aiter_lines():
                            if line.startswith("data: {"):
                                json.loads(line[6:])

            await asyncio.gather(*(client() for _ in range(clients)))

    began, spent = time.perf_counter(), cpu()
    asyncio.run(work())
    tell(requests, time.perf_counter() - began, cpu() - spent)


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tell(requests: int, seconds: float, spent: float) -> None:
    print(
        f"{requests / seconds:,.0f} requests/s by the clock; {spent / requests * 1e6:,.0f} us of processor time a "
        f"request: {requests / spent:,.0f} requests/s on a free core; "
        f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB of memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--library", choices=("qvl", "httpx"), default="qvl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            if options.library == "httpx":
                with_httpx(url, options.requests, options.clients)
            else:
                with_qvl(url, options.requests, options.clients, options.rate)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
