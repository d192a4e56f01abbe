"""Memory growth of a server: 100,000 requests of every kind through one `qvl-serve`, with a plot of its size.

    python benchmarks/bench_memory.py [--requests 100000] [--clients 16] [--plot memory.png] [--json memory.json]
    python benchmarks/bench_memory.py --requests 20000 --streams [--bundled] [--arenas 2]

Questions that are new and questions that are known, streamed and not, with pictures and without, refused ones, and
clients that leave in the middle, in front of a canned endpoint and with a SQLite cache. With --streams: new questions
alone, streamed, without a cache; with --bundled the bundled model answers them, 8 tokens each. Prints the resident size
of the server's process on the way, and what a line through the second half says for 100,000 requests. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = ("new", "new stream", "known", "known stream", "picture", "refused", "leaves")


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def picture(number: int) -> str:
    """A small picture that no other number has."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number & 255, number >> 8 & 255, number >> 16 & 255)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(kind: str, number: int) -> dict[str, Any]:
    text = "known" if kind.startswith("known") else f"question {number}"
    content: Any = text
    if kind == "picture":
        content = [{"type": "image_url", "image_url": {"url": picture(number)}}, {"type": "text", "text": text}]
    payload = {
        "messages": [{"role": "user", "content": content}],
        "stream": kind.endswith("stream") or kind == "leaves",
    }
    payload["max_tokens"] = 8
    return {**payload, "temperature": -1} if kind == "refused" else payload


def raw(kind: str, number: int) -> bytes:
    data = json.dumps(body(kind, number)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def answered(reader: asyncio.StreamReader) -> int:
    """Reads one answer; its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    if length:
        await reader.readexactly(int(length[1]))
    else:
        await reader.readuntil(b"\r\n0\r\n\r\n")
    return int(head[9:12])


class Load:
    """So many requests over so many connections, the kinds in turn."""

    def __init__(self, port: int, requests: int, kinds: Sequence[str] = KINDS) -> None:
        self.port = port
        self.kinds = kinds
        self.numbers = iter(range(requests))
        self.done = 0
        self.statuses: dict[int, int] = {}

    async def client(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        for number in self.numbers:
            kind = self.kinds[number % len(self.kinds)]
            writer.write(raw(kind, number))
            if kind == "leaves":
                await reader.read(64)
                writer.transport.abort()
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
            else:
                status = await answered(reader)
                self.statuses[status] = self.statuses.get(status, 0) + 1
            self.done += 1
        writer.close()

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self.client() for _ in range(clients)))


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


def served(upstream: str | None, cache: str, arenas: int | None) -> tuple[subprocess.Popen[str], int]:
    """A `qvl-serve` in front of `upstream`, or over the bundled model, and its port."""
    remote = f" openai:canned --base-url {upstream} --option probe=false --no-canary" if upstream else ""
    command = f"-m qvl.cli.serve{remote} --port 0"
    limits = {} if arenas is None else {"MALLOC_ARENA_MAX": str(arenas)}
    server = started([sys.executable, *command.split(), "--cache", cache, "--log-level", "warning"], **limits)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("  address"):
            # Whatever it writes from now on is read away, so that it never waits for us.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, int(line.strip().rpartition(":")[2])
    raise SystemExit("qvl-serve did not start")


def measure(
    requests: int,
    clients: int,
    *,
    streams: bool = False,
    bundled: bool = False,
    arenas: int | None = None,
    say: Any = print,
) -> dict[str, Any]:
    """(requests, MiB) at 200 moments, and how many answers had which status."""
    upstream = started([sys.executable, str(HERE / "load_client.py"), "--serve"])
    assert upstream.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        url = upstream.stdout.readline().strip()
        cache = "off" if streams else f"sqlite:///{folder}/answers.db"
        server, port = served(None if bundled else url, cache, arenas)
        points: list[tuple[int, float]] = []
        load = Load(port, requests, ("new stream",) if streams else KINDS)

        async def watch() -> None:
            step, following = max(1, requests // 200), 0
            began = time.perf_counter()
            while load.done < requests:
                if load.done >= len(points) * step:
                    points.append((load.done, resident(server.pid)))
                    if load.done >= following:
                        seconds = time.perf_counter() - began
                        say(f"{load.done:>8} requests  {points[-1][1]:7.1f} MiB  {seconds:6.0f} s", flush=True)
                        following += requests // 10
                await asyncio.sleep(0.05)
            points.append((load.done, resident(server.pid)))

        async def both() -> None:
            watcher = asyncio.create_task(watch())
            await load.run(clients)
            await watcher

        try:
            asyncio.run(both())
        finally:
            for process in (server, upstream):
                process.terminate()
                process.wait(30)
    return {"requests": requests, "clients": clients, "points": points, "statuses": load.statuses}


def slope(points: list[tuple[int, float]]) -> float:
    """MiB in 100,000 requests, of the line through the second half."""
    import numpy as np

    later = points[len(points) // 2 :]
    return float(np.polyfit([x for x, _ in later], [y for _, y in later], 1)[0]) * 100_000


def draw(report: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(*zip(*report["points"], strict=True), linewidth=1.2)
    axes.set(xlabel="requests", ylabel="resident memory, MiB", ylim=(0, None), xlim=(0, None))
    axes.set_title("qvl-serve under a mixture of requests")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--streams", action="store_true", help="new questions alone, streamed, without a cache")
    parser.add_argument("--bundled", action="store_true", help="the bundled model instead of a canned endpoint")
    parser.add_argument("--arenas", type=int, help="MALLOC_ARENA_MAX of the server")
    parser.add_argument("--plot", help="write a picture here")
    parser.add_argument("--json", help="write the points here")
    arguments = parser.parse_args()
    report = measure(
        arguments.requests,
        arguments.clients,
        streams=arguments.streams,
        bundled=arguments.bundled,
        arenas=arguments.arenas,
    )
    report["slope"] = slope(report["points"])
    if arguments.plot:
        draw(report, arguments.plot)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report))
    sizes = [size for _, size in report["points"]]
    half = sizes[len(sizes) // 2 :]
    print(f"{arguments.requests} requests, statuses {report['statuses']}")
    print(
        f"second half: {min(half):.1f} to {max(half):.1f} MiB; its line: {report['slope']:+.1f} MiB in 100,000 requests"
    )


if __name__ == "__main__":
    main()
