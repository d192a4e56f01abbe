"""The dated matrix of compatible versions, and the comparison of version strings.

`matrix.json` is data: a date, its sources, and facts. A version that it does not list is reported as unknown, never
as wrong. A newer file can take its place for one examination: `read` it, and examine in `with use(...)`.
"""

from __future__ import annotations

import codecs
import datetime
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from qvl.errors import BackendUnavailableError, ConfigError, first_line

LARGEST: Final = 2**20
STALE_DAYS: Final = 90
SHIPPED: Final = "the one of this version of qvl"
_VERSION: Final = r"v?[0-9]{1,9}(\.[0-9]{1,9})*([._-]?(dev|a|alpha|b|beta|rc|post)[._-]?[0-9]{0,9})*(\+[0-9a-z.]+)?"
_STAGES: Final = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "rc": -1, "post": 1}
_NO_DEV: Final = 10**9


def _as_version(text: str) -> str:
    if not re.fullmatch(_VERSION, text, re.IGNORECASE):
        raise PydanticCustomError("version", "{text} is not a version", {"text": repr(text[:40])})
    return text


Version: TypeAlias = Annotated[str, AfterValidator(_as_version)]


class VllmAscendRelease(TypedDict, total=False):
    """The versions that one release of vllm-ascend needs; what is not known is left out."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    vllm: Version
    cann: Version
    torch: Version
    torch_npu: Version
    triton_ascend: Version
    python: Annotated[list[Version], Field(min_length=2, max_length=2)]


class VersionRange(TypedDict):
    """The oldest version that works and the newest (Python), or the first that is too new (transformers)."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    min: Version
    max: Version


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
    cann_for_torch_npu: dict[Version, Version | None]
    vllm_ascend: dict[Version, VllmAscendRelease]
    model_types: dict[str, Version]
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
        final = ".".join(map(str, release(vllm_ascend)))
        return next((name for name in self.vllm_ascend if same(name, final)), None)


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
    if not source:
        raise ConfigError("--matrix names no file", hint="name a file, or an http(s) URL")
    return parse(_fetch(source) if re.match(r"https?://", source, re.IGNORECASE) else _open(source), source)


def parse(text: bytes, origin: str) -> Matrix:
    """Return the matrix in a JSON text; `origin` is where it came from.

    Raises:
        ConfigError: it is not JSON, lacks a field, or has one that this version of qvl does not know.
    """
    hint = "take a matrix.json as qvl ships it: a date, its sources, and rows of versions"
    try:
        table = Matrix.model_validate_json(text.removeprefix(codecs.BOM_UTF8)).model_copy(update={"origin": origin})
        table.day()
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
        # Looked at before it is opened: a pipe would wait for a writer, and a device may have no end.
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"--matrix {source} is not a regular file", hint="name a matrix.json, or an http(s) URL")
        with path.open("rb") as stream:
            body = stream.read(LARGEST + 1)
        if len(body) > LARGEST:
            raise ConfigError(f"--matrix {source} is over 1 MiB", hint="name a matrix.json")
        return body
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
    """Return a sort key of a version: major, minor, patch, stage, its number, and that of a dev build of the stage.

    `0.23.0.dev3` < `0.23.0b1` < `0.23.0rc1.dev2` < `0.23.0rc1` < `0.23.0`; `8.3.RC1` < `8.3.0`, `2.9` < `2.9.post2`;
    `+cpu` is ignored.
    """
    text = version.split("+")[0].lower().lstrip("v")
    match = re.match(r"[0-9]{1,9}(?:\.[0-9]{1,9})*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    parts = re.findall(r"(dev|alpha|beta|post|rc|a|b)[._-]?([0-9]{0,9})", text[match.end() :] if match else "")
    stages = [(_STAGES[name], int(number or 0)) for name, number in parts]
    stage = stages[0] if stages else (0, 0)
    dev = next((number for order, number in stages[1:] if order == _STAGES["dev"]), _NO_DEV)
    return (*[*numbers, 0, 0, 0][:3], *stage, dev)


def untagged(version: str) -> bool:
    """True for the version of a source tree without tags (`0.1.dev1+g0f3c2d1`), which says nothing of its release."""
    return re.match(r"v?0\.[01](\.0)?\.dev", version) is not None


def release(version: str) -> tuple[int, ...]:
    """Return (major, minor, patch) of a version, which must be equal for torch and torch_npu."""
    return key(version)[:3]


def same(a: str, b: str) -> bool:
    """True if two spellings mean the same version (`8.3.RC1`, `8.3.rc1`)."""
    return key(a) == key(b)
