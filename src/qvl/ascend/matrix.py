"""The dated matrix of compatible versions, and the comparison of version strings.

`matrix.json` is data: a date, its sources, and facts. A version that it does not list is reported as unknown, never
as wrong. A newer file can take its place for one examination: `read` it, and examine in `with use(...)`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from qvl.errors import BackendUnavailableError, ConfigError, first_line

LARGEST: Final = 2**20
STALE_DAYS: Final = 90
SHIPPED: Final = "the one of this version of qvl"


class VllmAscendRelease(TypedDict, total=False):
    """The versions that one release of vllm-ascend needs; what is not known is left out."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    vllm: str
    cann: str
    torch: str
    torch_npu: str
    triton_ascend: str
    python: list[str]


class VersionRange(TypedDict):
    """The oldest version that works and the newest (Python), or the first that is too new (transformers)."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    min: str
    max: str


class Matrix(BaseModel):
    """The content of matrix.json; field names are its keys, `origin` is where it was read.

    `cann_for_torch_npu` has null for a torch_npu whose CANN is not known. `model_types` are those that vllm-ascend
    serves, with the first transformers that has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["qvl-matrix-1"]
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    sources: tuple[str, ...] = Field(min_length=1)
    python: VersionRange
    transformers: VersionRange
    cann_for_torch_npu: dict[str, str | None]
    vllm_ascend: dict[str, VllmAscendRelease]
    model_types: dict[str, str]
    origin: str = SHIPPED

    def day(self) -> datetime.date:
        """Return `date`, the day of which the facts are."""
        return datetime.date.fromisoformat(self.date)

    def age(self, today: datetime.date | None = None) -> int:
        """Return the days since `date`."""
        return ((today or datetime.datetime.now(tz=datetime.UTC).date()) - self.day()).days

    def release(self, vllm_ascend: str) -> str | None:
        """Return the row's name of a version of vllm-ascend: the version itself, else for a post its final; or None."""
        own = next((name for name in self.vllm_ascend if same(name, vllm_ascend)), None)
        if own is not None or key(vllm_ascend)[3] < 0:
            return own
        final = (*key(vllm_ascend)[:3], 0, 0)
        return next((name for name in self.vllm_ascend if key(name) == final), None)


_CURRENT: ContextVar[Matrix | None] = ContextVar("matrix", default=None)


def load() -> Matrix:
    """Return the matrix in use: that of `use`, else the one that ships with this version of qvl."""
    return _CURRENT.get() or _shipped()


@contextmanager
def use(table: Matrix) -> Iterator[None]:
    """In the context, `load` returns `table`."""
    token = _CURRENT.set(table)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@lru_cache(maxsize=1)
def _shipped() -> Matrix:
    return parse(resources.files("qvl.ascend").joinpath("matrix.json").read_bytes(), SHIPPED)


def read(source: str) -> Matrix:
    """Return the matrix in a file, or at an http(s) URL.

    Raises:
        BackendUnavailableError: the URL gives no answer, or one that is not 200.
        ConfigError: the file cannot be read, is over 1 MiB, or is not a matrix.
    """
    return parse(_fetch(source) if re.match(r"https?://", source) else _open(source), source)


def parse(text: bytes, origin: str) -> Matrix:
    """Return the matrix in a JSON text; `origin` is where it came from.

    Raises:
        ConfigError: it is not JSON, lacks a field, or has one that this version of qvl does not know.
    """
    hint = "take a matrix.json as qvl ships it: a date, its sources, and rows of versions"
    try:
        table = Matrix.model_validate_json(text).model_copy(update={"origin": origin})
        table.day()
        for version in (*table.cann_for_torch_npu, *table.vllm_ascend, *table.model_types.values()):
            if not re.match(r"v?\d", version):
                raise ConfigError(f"the matrix of {origin}: {version!r} is not a version", hint=hint)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
        said = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise ConfigError(f"the matrix of {origin} cannot be used: {said}{more}", hint=hint) from exc
    except ValueError as exc:
        raise ConfigError(f"the matrix of {origin} cannot be used: date: {exc}", hint=hint) from exc
    return table


def _open(source: str) -> bytes:
    path = Path(source).expanduser()
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"--matrix {source} is over 1 MiB", hint="name a matrix.json")
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"--matrix {source} cannot be read: {exc.strerror or exc}", hint="name a file, or an http(s) URL"
        ) from exc


def _fetch(url: str) -> bytes:
    import httpx

    body = b""
    try:
        # The proxies of the environment hold: this goes out into the net, unlike a call to a local engine.
        with httpx.stream("GET", url, timeout=20.0, follow_redirects=True) as response:
            if response.status_code != 200:
                raise BackendUnavailableError(f"--matrix {url}: HTTP {response.status_code}", hint="check the address")
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > LARGEST:
                    raise ConfigError(f"--matrix {url} is over 1 MiB", hint="name a matrix.json")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise BackendUnavailableError(
            f"--matrix {url}: {type(exc).__name__}: {first_line(exc)}", hint="fetch it elsewhere and name the file"
        ) from exc
    return body


def key(version: str) -> tuple[int, ...]:
    """Return a sort key of a version: `8.3.RC1` < `8.3.RC2` < `8.3.0`, `2.9` < `2.9.post2`; `+cpu` is ignored."""
    text = version.split("+")[0].lower().lstrip("v")
    match = re.match(r"(\d+(?:\.\d+)*)", text)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    stage = re.search(r"\.?(rc|alpha|beta|post)\.?(\d*)", text)
    order = {"alpha": -3, "beta": -2, "rc": -1, "post": 1}
    tail = (order[stage[1]], int(stage[2] or 0)) if stage else (0, 0)
    return (*[*numbers, 0, 0, 0][:3], *tail)


def release(version: str) -> tuple[int, ...]:
    """Return (major, minor, patch) of a version, which must be equal for torch and torch_npu."""
    return key(version)[:3]


def same(a: str, b: str) -> bool:
    """True if two spellings mean the same version (`8.3.RC1`, `8.3.rc1`)."""
    return key(a) == key(b)
