"""`qvl version`: the version information for a bug report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Final

import typer

from qvl.cli import options
from qvl.cli.terminal import print_json

PACKAGES: Final = (
    *("torch", "torch-npu", "transformers", "vllm", "openvino-genai"),
    *("openai", "redis", "fastapi", "pillow", "pydantic"),
)


def version(as_json: options.JsonOnly = False) -> None:
    """Print the versions of qvl, Python and its packages, without importing the packages."""
    from qvl._version import __version__

    versions: dict[str, str | None] = {
        "qvl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = version_of(name)
        except PackageNotFoundError:
            versions[name] = None
    if as_json:
        print_json(versions)
        return
    for name, value in versions.items():
        typer.echo(f"{name:<13} {value or 'not installed'}")
