"""What every test stands on: a home and an environment of its own, whoever runs it and wherever."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import certifi
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
LAST_MAJOR = "openai>=2.20,<3"
# What a test may see of whoever runs it: where programs lie, how text is written, how Python and pytest behave.
# Settings of qvl, keys, proxies, and what other packages are told (HF_…, OPENAI_…, ASCEND_…) are none of its business.
KEPT = ("CHROMIUM", "CI", "CUDA_VISIBLE_DEVICES", "LANG", "PATH", "QVL_PUBLISHED_QWEN3_VL", "TERM", "TMPDIR", "USER")
KEPT_FAMILIES = ("COVERAGE_", "LC_", "LD_", "MKL_", "OMP_", "PYTEST_", "PYTHON", "TZ", "VIRTUAL_ENV", "VLLM_TARGET_")
# For pip and npm, which may need a proxy and certificates; a worker of pytest-xdist is told by who started it.
AS_FOUND: dict[str, str] = json.loads(os.environ.pop("PYTEST_AS_FOUND", "null")) or dict(os.environ)
CONFIGURED = ("qvl", "opentelemetry")  # loggers that commands give handlers and levels
# What takes longest: given out first, so that no worker is left alone with one of these, and left out of `make quick`.
LONGEST = (
    "backends/local",
    "cli/test_bundled.py",
    "bench/test_figures.py",
    "server/test_load.py",
    "server/batches/test_batches_killed.py",
    "bench/test_load.py",
    "pipeline/test_bundled.py",
    "ascend/test_endpoint.py",
    "ascend/test_serve_fits.py",
    "contract",
    "backends/openai/test_faults.py",
    "server/test_errors.py",
    "pipeline/test_leases.py",
    "pipeline/test_blocking.py",
    "pipeline/test_parts.py",
    "server/test_tool_clients.py",
    "server/test_requests_of_clients.py",
    "media/test_media_structure.py",
    "backends/test_contract.py",
    "backends/openai/test_fleet.py",
    "agent/integrations/test_chat_model.py",
    "agent/integrations/test_chat_model_bundled.py",
    "cli/test_terminal.py",
    "caches/test_sqlite.py",
    "cli/test_interrupted_load.py",
    "agent/integrations/test_mcp.py",
    "backends/openai/test_transport.py",
    "pipeline/test_processes.py",
    "backends/test_plugin_example.py",
    "cli/test_ending.py",
    "media/test_media_avif.py",
    "media/test_media_costly_text.py",
    "caches/test_redis_requests.py",
    "bench/test_output.py",
    "caches/test_model.py",
    "caches/test_contract.py",
    "caches/test_redis.py",
    "cli/test_bad_input.py",
    "cli/test_cache_command.py",
    "server/test_published_schema.py",
    "server/test_made_messages.py",
    "server/test_access.py",
    "server/test_ssrf.py",
    "tiny",
    "training",
    "examples",
    "backends/ray",
    "backends/vllm",
    "backends/openvino",
)
_RUN = pytest.StashKey[Path]()
_numbers = count()


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected, since packages read the environment when they are imported."""
    # Modules and thousands of tests are no garbage; looking through them again and again took a seventh of the run.
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell has it for what it starts in the background; it would be so for every process of the tests too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_RUN] = run = Path(tempfile.mkdtemp(prefix="qvl-tests-"))
    for name in list(os.environ):
        if name not in KEPT and not name.startswith(KEPT_FAMILIES):
            del os.environ[name]
    if getattr(config.option, "numprocesses", None):
        os.environ["PYTEST_AS_FOUND"] = json.dumps(AS_FOUND)
    os.environ |= home_of(run / "home")
    # One authority instead of all: reading them takes 20 ms in every client that is made, and nobody is called outside.
    authority = run / "authority.pem"
    authority.write_text("".join(Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")[:2]))
    os.environ["SSL_CERT_FILE"] = str(authority)
    # Its list of fonts takes seconds to make.
    os.environ["MPLCONFIGDIR"] = str(run / "matplotlib")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip what starts a process, needs torch, or takes long")


def _rank(path: Path) -> int:
    """Its place in LONGEST, or behind."""
    own = path.relative_to(ROOT / "tests").as_posix() if path.is_relative_to(ROOT / "tests") else ""
    return next((n for n, name in enumerate(LONGEST) if own == name or own.startswith(f"{name}/")), len(LONGEST))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--quick") and _rank(collection_path) < len(LONGEST) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        sys.meta_path.insert(0, _NoTorch())
        subprocess.Popen.__init__ = _stay_quick  # type: ignore[method-assign]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: _rank(item.path))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _stay_quick(*_: object, **__: object) -> None:
    pytest.skip("not quick: it starts a process or needs torch")


class _NoTorch:
    """Finds nothing; that torch is looked for ends a test. An audit hook would slow down everything else."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            _stay_quick()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_RUN], ignore_errors=True)


def home_of(folder: Path) -> dict[str, str]:
    """Makes a home in `folder`; the variables that lead there."""
    folder.mkdir()
    places = {"CACHE": ".cache", "CONFIG": ".config", "DATA": ".local/share", "STATE": ".local/state"}
    return {"HOME": str(folder)} | {f"XDG_{name}_HOME": str(folder / place) for name, place in places.items()}


@pytest.fixture(autouse=True)
def _own_home(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test, and every process it starts, has an empty home; what it does to the environment ends with it.

    What a process of one test measured of this processor, those of the next ones need not measure again.
    """
    before = dict(os.environ)
    run = pytestconfig.stash[_RUN]
    home, measured = run / str(next(_numbers)), run / "kernels.json"
    os.environ |= home_of(home)
    kernels = home / ".cache" / "qvl" / measured.name
    measures = request.path.is_relative_to(ROOT / "tests" / "backends" / "local")
    if measured.exists() and not measures:
        kernels.parent.mkdir(parents=True)
        shutil.copy(measured, kernels)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before
    if kernels.exists() and not measures and not measured.exists():
        shutil.copy(kernels, measured)
    shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def own_logs() -> Iterator[None]:
    """Ends with the logs set up as they were: what a command sets up in this process writes to a captured stderr."""
    flags = {name: getattr(logging, name) for name in ("logThreads", "logProcesses", "logMultiprocessing")}
    before = {log: (log.handlers[:], log.level, log.propagate) for log in _loggers()}
    yield
    for log in _loggers():
        log.handlers[:], level, log.propagate = before.get(log, ([], logging.NOTSET, True))
        if log.level != level:
            log.setLevel(level)
    vars(logging).update(flags)


def _loggers() -> list[logging.Logger]:
    """Those that qvl sets up, and what is below them."""
    named = logging.Logger.manager.loggerDict.items()
    return [log for name, log in named if name.startswith(CONFIGURED) and isinstance(log, logging.Logger)]


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    with own_logs():
        yield


@pytest.fixture(scope="session")
def last_major() -> str:
    """A folder with the client's last major version, beside nothing else of this environment."""
    folder = ROOT / "build" / "openai2"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "openai").exists():
            new = folder.with_name("openai2.new")
            command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(new), LAST_MAJOR]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=AS_FOUND)
            if done.returncode:
                pytest.skip(f"{LAST_MAJOR} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    return str(folder)
