"""`qvl models`: the bundled model, what the hub's cache on this machine holds, and what Qwen publishes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypedDict

from qvl.cli import options
from qvl.cli.terminal import print_json


class Bundled(TypedDict):
    """The bundled checkpoint."""

    path: str
    present: bool
    bytes: int


class LocalModel(TypedDict):
    """A repository in the hub's cache; `quantisation` is None where its weights are not quantised."""

    model: str
    path: str
    bytes: int
    quantisation: str | None


class PublishedModel(TypedDict):
    """A published size. Parameters are in billions, as counted in the checkpoint; `active` of a mixture."""

    model: str
    size: str
    parameters: float
    active: float | None
    weights_gb: float
    memory_gb: float


# (size, billions of parameters, those that are active)
PUBLISHED: Final = (
    ("2B", 2.1, None),
    ("4B", 4.4, None),
    ("8B", 8.8, None),
    ("32B", 33.4, None),
    ("30B-A3B", 31.1, 3.0),
    ("235B-A22B", 235.7, 22.0),
)
OVERHEAD_GB: Final = 2.0


def models(as_json: options.JsonOnly = False) -> None:
    """The bundled model, what is on this machine, and what is published, with the memory that each needs."""
    bundle, local, sizes = bundled(), on_this_machine(), published()
    if as_json:
        print_json({"bundled": bundle, "on_this_machine": local, "published": sizes})
        return
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout

    console = stdout()
    table = Table(title="Here", title_justify="left")
    for column in ("--model", "size", "what it is"):
        table.add_column(column, overflow="fold")
    about = "bundled; reads qvl's own drawn pictures, not photographs"
    table.add_row("(none)", _gb(bundle["bytes"]), about if bundle["present"] else "bundled; weights are missing")
    for repo in local:
        about = f"in the hub's cache, {repo['path']}"
        if repo["quantisation"]:
            about = f"quantised ({repo['quantisation']}): for vllm: or an endpoint, not for the local backend; {about}"
        table.add_row(Text(repo["model"]), _gb(repo["bytes"]), Text(about))
    console.print(table)

    table = Table(title="Published (each also as Thinking)", title_justify="left")
    for column in ("--model", "parameters", "memory, bfloat16"):
        table.add_column(column)
    for row in sizes:
        active = f", {row['active']:g} B active" if row["active"] else ""
        table.add_row(row["model"], f"{row['parameters']:g} B{active}", f"{row['memory_gb']:.0f} GB")
    console.print(table)
    console.print(f"Memory: weights and {OVERHEAD_GB:g} GB; longer contexts and many at once need more.")


def bundled() -> Bundled:
    """Return the bundled checkpoint: its folder, whether its weights are there, its size in bytes."""
    import qvl

    folder = Path(qvl.__file__).parent / "tiny" / "weights"
    files = list(folder.glob("*")) if folder.is_dir() else []
    return {
        "path": str(folder),
        "present": any(file.suffix == ".safetensors" for file in files),
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
    }


def on_this_machine(folder: Path | None = None) -> list[LocalModel]:
    """Return Qwen3-VL repositories in the Hugging Face cache (`folder`, or the user's own); empty without a cache."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:
        return []
    try:
        repos = scan_cache_dir(folder).repos
    except (CacheNotFound, OSError, RuntimeError):  # the last: this user has no home
        return []
    return [
        {
            "model": repo.repo_id,
            "path": str(repo.repo_path),
            "bytes": repo.size_on_disk,
            "quantisation": _quantisation(revision.snapshot_path for revision in repo.revisions),
        }
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model" and "qwen3-vl" in repo.repo_id.lower()
    ]


def _quantisation(snapshots: Iterable[Path]) -> str | None:
    """The quantisation of a repository's weights; None where they are not quantised, or cannot be read."""
    from qvl.backends.local.model.checkpoint_files import quantisation, read_json
    from qvl.errors import ConfigError

    for folder in snapshots:
        try:
            return quantisation(folder, read_json(folder / "config.json", folder.name))
        except (ConfigError, OSError):
            continue
    return None


def published() -> list[PublishedModel]:
    """Return every published size with the memory it needs, in GB: bfloat16 takes two bytes a parameter."""
    return [
        {
            "model": f"Qwen/Qwen3-VL-{size}-Instruct",
            "size": size,
            "parameters": parameters,
            "active": active,
            "weights_gb": round(parameters * 2, 1),
            "memory_gb": round(parameters * 2 + OVERHEAD_GB, 1),
        }
        for size, parameters, active in PUBLISHED
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
