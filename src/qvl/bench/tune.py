"""`qvl tune`: measures settings of a server on this host and keeps the best as a recipe.

The first value of every axis is the start. One axis after the other is walked through with the best values so far, so
that a grid of n axes costs the sum of their values, not the product. Each measurement is a run of `qvl bench` in a
folder of its own; a tuning that is resumed reads the folders that are whole.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, TypedDict

from qvl.bench.record import SUMMARY, write_json
from qvl.bench.run import Run, Target
from qvl.bench.tune_grid import SHORT, refuse_more_than
from qvl.errors import ConfigError, QvlError, write_failed

if TYPE_CHECKING:
    from qvl.bench.dataset import Dataset
    from qvl.bench.plan import LoadPlan
    from qvl.bench.summary import SummaryData
    from qvl.bench.tune_grid import Axis

STATE: Final = "tune.json"
RECIPE: Final = "recipe.json"
LEAST_SUCCESS: Final = 0.99
# Better by less is noise: then the setting that was there first stays.
LEAST_GAIN: Final = 1.02


class Measurement(TypedDict, total=False):
    """One setting at one number of clients: its figures, or `error` in one line."""

    flags: list[str]
    clients: int
    score: float
    requests_per_second: float | None
    goodput_requests_per_second: float | None
    ttft_p50: float | None
    e2e_p99: float | None
    success_rate: float | None
    folder: str
    error: str


@dataclass(frozen=True)
class TunePlan:
    """A plan of measurements: the server's command (None: the endpoint at `target.urls` as it is), axes, load, input.

    `command` has `{port}` where the server takes its port, and may have `{flags}` where the flags go, else they come
    last. `stop` is a command that ends a server which outlives its own, such as a container. `wait` is in seconds.
    `npus` is how many a server may take, 0 for unknown.
    """

    target: Target
    dataset: Dataset
    load: LoadPlan
    clients: tuple[int, ...]
    command: str | None = None
    axes: tuple[Axis, ...] = ()
    stop: str | None = None
    wait: float = 600.0
    npus: int = 0

    def __post_init__(self) -> None:
        if not self.clients or any(level < 1 for level in self.clients):
            raise ConfigError("no number of clients to measure", hint="--concurrency 1,4,16")
        if self.command is None and not self.target.urls:
            raise ConfigError("nothing to tune", hint="--url http://127.0.0.1:8000/v1, or --launch 'COMMAND'")
        if self.command is None and self.axes:
            raise ConfigError("flags of a running server cannot be varied", hint="--launch 'qvl-serve --port {port}'")
        if self.command is not None:
            if "{port}" not in self.command and not self.target.urls:
                raise ConfigError("--launch has no {port}", hint="write {port} in it, or name its address with --url")
            self.words(0, [])
        flags = [flag for axis in self.axes for flag in axis.flags]
        if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
            raise ConfigError(f"{twice} is varied twice", hint="give all its values at once")
        if given := next((flag for flag in flags if flag in given_flags(self.command)), None):
            raise ConfigError(f"{given} is both varied and in --launch", hint="leave it out of --launch")
        if self.npus and self.command is not None:
            refuse_more_than(self.npus, self.axes, self.words(0, []))

    def words(self, port: int, flags: Sequence[str]) -> list[str]:
        """Return the server's command line with a port and flags."""
        try:
            words = shlex.split(self.command or "")
        except ValueError as exc:
            raise ConfigError(f"--launch cannot be read: {exc}", hint="quote it as a shell does") from exc
        if not words:
            raise ConfigError("--launch is empty", hint="--launch 'qvl-serve --port {port}'")
        if "{flags}" in words:
            place = words.index("{flags}")
            words[place : place + 1] = flags
        else:
            words += flags
        return [word.replace("{port}", str(port)) for word in words]

    def facts(self) -> dict[str, object]:
        """Return the plan as JSON values; two plans with the same ones measure the same."""
        return {
            "command": self.command,
            "axes": [[axis.flag, *axis.values] for axis in self.axes],
            "urls": list(self.target.urls),
            "model": self.target.model,
            "params": dict(self.target.params),
            "input": self.dataset.facts(),
            "clients": list(self.clients),
            "load": self.load.facts(),
        }


def given_flags(command: str | None) -> frozenset[str]:
    """Return the flags in a command line, short names of vLLM's parallel sizes as their long ones."""
    names = [word.partition("=")[0] for word in (command or "").split()]
    return frozenset(SHORT.get(name, name) for name in names if name.startswith("-"))


@dataclass
class Tuning:
    """The tuning of `plan` in the folder `out`. `say` is called with a line about each step."""

    plan: TunePlan
    out: Path
    resume: bool = False
    say: Callable[[str], None] = lambda line: None
    measured: list[Measurement] = field(default_factory=list)

    def work(self) -> dict[str, object]:
        """Measure what is left, write recipe.json and return it.

        Raises:
            ConfigError: the folder is another tuning's, or is in use without `resume`.
            QvlError: no setting could be measured.
        """
        self._open()
        chosen = [axis.values[0] for axis in self.plan.axes]
        best = self._measure(chosen)
        for number, axis in enumerate(self.plan.axes):
            for value in axis.values[1:]:
                tried = [*chosen[:number], value, *chosen[number + 1 :]]
                found = self._measure(tried)
                if found is not None and (best is None or found["score"] > best["score"] * LEAST_GAIN):
                    best, chosen = found, tried
        if best is None:
            rates = [item["success_rate"] or 0.0 for item in self.measured if "error" not in item]
            if rates:
                said = f"no setting answered {LEAST_SUCCESS:.0%} of its requests; the best answered {max(rates):.1%}"
                raise QvlError(said, hint=f"fewer --concurrency, or see the answers in {self.out}")
            errors = [item["error"] for item in self.measured if "error" in item]
            raise QvlError(f"no setting could be measured: {errors[0]}", hint=f"see the logs in {self.out}")
        recipe: dict[str, object] = {
            "format": "qvl-tune-1",
            "host": f"{platform.node()} {platform.machine()}, {os.cpu_count()} cores",
            "asked": self.plan.facts(),
            "score": "goodput_requests_per_second" if self.plan.load.slo else "requests_per_second",
            "best": best,
            "command": None
            if self.plan.command is None
            else shlex.join(self.plan.words(0, best["flags"])).replace("--port 0", "--port 8000"),
            "measured": self.measured,
        }
        self._write(RECIPE, recipe)
        return recipe

    def _open(self) -> None:
        asked = json.loads(json.dumps(self.plan.facts()))
        state = self.out / STATE
        if state.exists():
            if not self.resume:
                raise ConfigError(f"{self.out} has a tuning already", hint="--resume goes on with it; or another --out")
            try:
                before = json.loads(state.read_text(encoding="utf-8"))
            except (OSError, ValueError) as exc:
                raise ConfigError(f"{state} cannot be read", hint="take another --out") from exc
            if before != asked:
                names = [name for name in asked if not isinstance(before, dict) or before.get(name) != asked[name]]
                raise ConfigError(f"{self.out} measured something else: {', '.join(names)}", hint="another --out")
        elif self.resume:
            raise ConfigError(f"{self.out} has no tuning to resume", hint="leave --resume out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise write_failed(str(self.out), exc) from exc
        self._write(STATE, asked)

    def _write(self, name: str, body: object) -> None:
        try:
            (self.out / name).write_text(json.dumps(body, ensure_ascii=False, indent=2), encoding="utf-8")
        except OSError as exc:
            raise write_failed(str(self.out / name), exc) from exc

    def _measure(self, values: Sequence[str]) -> Measurement | None:
        """Return the best of a setting's levels; None if none could be measured."""
        pairs = zip(self.plan.axes, values, strict=True)
        flags = [word for axis, value in pairs for word in axis.words(value)]
        # The place in the grid is the name: it is the same when the tuning is resumed.
        places = [axis.values.index(value) for axis, value in zip(self.plan.axes, values, strict=True)]
        folder = self.out / ("-".join(["setting", *map(str, places)]) if places else "endpoint")
        levels = {level: folder / f"clients-{level}" for level in self.plan.clients}
        known = {level: data for level, path in levels.items() if (data := _finished(path)) is not None}
        self.say(
            f"{shlex.join(flags) or 'as it is'}: {'measured before' if len(known) == len(levels) else 'measuring'}"
        )
        found: list[Measurement] = []
        try:
            if len(known) < len(levels):
                with self._server(flags, folder) as url:
                    for level, path in levels.items():
                        if level not in known:
                            known[level] = self._run(url, level, path)
        except (QvlError, OSError) as exc:
            self.measured.append({"flags": flags, "error": str(exc)})
            self.say(f"  failed: {exc}")
        for level, data in sorted(known.items()):
            found.append(_figures(flags, level, levels[level], data))
            self.say(f"  {level} clients: {found[-1]['score']:.2f} requests/s that count")
        self.measured += found
        good = [item for item in found if (item["success_rate"] or 0) >= LEAST_SUCCESS]
        return max(good, key=lambda item: item["score"], default=None)

    def _run(self, url: str, level: int, path: Path) -> SummaryData:
        if path.exists():
            # Cut off in the middle: its half would be of another server process.
            for file in path.iterdir():
                file.unlink()
        target = replace(self.plan.target, urls=(url,))
        data = Run(target, self.plan.dataset, replace(self.plan.load, concurrency=level), path).work().data
        if data["interrupted"]:
            (path / SUMMARY).unlink()
            raise KeyboardInterrupt
        write_json(path / SUMMARY, data)
        return data

    @contextmanager
    def _server(self, flags: Sequence[str], folder: Path) -> Iterator[str]:
        """In the context a server with `flags` runs, at the URL that is yielded."""
        if self.plan.command is None:
            yield self.plan.target.urls[0]
            return
        port = _free_port()
        url = self.plan.target.urls[0] if self.plan.target.urls else f"http://127.0.0.1:{port}/v1"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "server.log"
        with log.open("w", encoding="utf-8") as file:
            process = _start(self.plan.words(port, flags), file)
            try:
                self._until_ready(process, url, log)
                yield url
            finally:
                _end(process)
                if self.plan.stop is not None:
                    subprocess.run(shlex.split(self.plan.stop), stdout=file, stderr=file, check=False)  # noqa: S603

    def _until_ready(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        import httpx

        key = self.plan.target.api_key
        headers = {**self.plan.target.headers, **({"Authorization": f"Bearer {key}"} if key else {})}
        deadline = time.monotonic() + self.plan.wait
        root = url.removesuffix("/").removesuffix("/v1")
        with httpx.Client(timeout=5.0, trust_env=False, headers=headers, verify=self.plan.target.verify) as client:
            while time.monotonic() < deadline:
                code = process.poll()
                # `qvl launch` ends once its container is ready; --stop says that this is how it is meant.
                if code is not None and (code != 0 or self.plan.stop is None):
                    raise QvlError(f"the server ended with exit code {code}: {_last_line(log)}", hint=f"see {log}")
                try:
                    # qvl-serve says at /ready that the model is loaded, vLLM at /health; others have neither.
                    status = client.get(f"{root}/ready").status_code
                    if status == 404:
                        status = client.get(f"{root}/health").status_code
                    if status in (200, 404) and client.get(f"{root}/v1/models").status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
        raise QvlError(f"the server was not ready after {self.plan.wait:g} s: {_last_line(log)}", hint="--wait SECONDS")


def _figures(flags: list[str], level: int, folder: Path, data: SummaryData) -> Measurement:
    group = data["endpoints"][0] if data["endpoints"] else data["all"][0]
    rates, ttft, e2e = group["throughput"], group["figures"]["ttft"], group["figures"]["e2e"]
    good = rates["goodput_requests_per_second"]
    return {
        "flags": flags,
        "clients": level,
        "score": (rates["requests_per_second"] if good is None else good) or 0.0,
        "requests_per_second": rates["requests_per_second"],
        "goodput_requests_per_second": good,
        "ttft_p50": ttft and ttft["p50"],
        "e2e_p99": e2e and e2e["p99"],
        "success_rate": group["requests"]["success_rate"],
        "folder": str(folder),
    }


def _finished(folder: Path) -> SummaryData | None:
    try:
        data: SummaryData = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(words: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    except OSError as exc:
        raise ConfigError(f"--launch: {words[0]}: {exc.strerror or exc}", hint="name a program on PATH") from exc


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(30)
            break
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
