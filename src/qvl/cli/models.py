"""`qvl models`: the bundled model, models in the local hub cache, and models that Qwen publishes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from qvl.backends.local.model.model_size import PUBLISHED, published_id
from qvl.cli import options
from qvl.cli.fit import OVERHEAD, SHORTEST_CONTEXT, Fit, Form, Place, fit_all, in_16_bits, memory_of, places, size_named
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text


class Bundled(TypedDict):
    """Where the checkpoint that comes with the package is, whether it is installed, and its size in bytes."""

    path: str
    present: bool
    bytes: int


class LocalModel(TypedDict):
    """A repository in the hub's cache; `quantisation` is None where its weights are not quantised.

    `readable`: whether the local backend reads weights in that form.
    """

    model: str
    path: str
    bytes: int
    quantisation: str | None
    readable: bool


class PublishedModel(TypedDict):
    """A published model size. Parameters are in billions; `active` are those of a mixture of experts."""

    model: str
    size: str
    parameters: float
    active: float | None
    weights_gb: float
    memory_gb: float


class Memory(TypedDict):
    """A memory for `--fit`: gigabytes of 1e9 bytes, read a second in the last."""

    device: str
    name: str
    free_gb: float
    total_gb: float
    bandwidth_gb_s: float


def models(
    model: Annotated[
        str | None, typer.Argument(help="With --fit: a folder or hub id, instead of those that Qwen publishes.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="What fits in this machine's memory, in which form, and how fast.")
    ] = False,
    as_json: options.JsonOnly = False,
) -> None:
    """List the bundled model, models on this machine, and published ones, with the memory that each needs."""
    if model is not None and not fit:
        raise ConfigError("a model is named for --fit only", hint=f"qvl models --fit {model}")
    if fit:
        _show_fit(model, as_json=as_json)
        return
    bundle, local, sizes = bundled(), on_this_machine(), published()
    if as_json:
        print_json({"bundled": bundle, "on_this_machine": local, "published": sizes})
        return
    _show_known(bundle, local, sizes)


def _show_known(bundle: Bundled, local: list[LocalModel], sizes: list[PublishedModel]) -> None:
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
            use = "unpacked when it is loaded" if repo["readable"] else "for vllm: or an endpoint, not for local:"
            about = f"quantised ({repo['quantisation']}): {use}; {about}"
        table.add_row(Text(repo["model"]), _gb(repo["bytes"]), Text(about))
    console.print(table)

    table = Table(title="Published (each Qwen3-VL also as Thinking)", title_justify="left")
    for column in ("--model", "parameters", "memory, bfloat16"):
        table.add_column(column)
    for row in sizes:
        active = f", {row['active']:g} B active" if row["active"] else ""
        table.add_row(row["model"], f"{row['parameters']:g} B{active}", f"{row['memory_gb']:.0f} GB")
    console.print(table)
    console.print(f"Memory on a CPU, as in --fit: weights, {OVERHEAD / 1e9:g} GB, KV of {SHORTEST_CONTEXT:,} tokens.")
    console.print("What fits in this machine, and how fast: qvl models --fit")


def _show_fit(model: str | None, *, as_json: bool) -> None:
    sizes = {published_id(name): size for name, size in PUBLISHED.items()}
    if model is not None:
        sizes = {model: size_named(model)}
    memories = places()
    rows = fit_all(sizes, memories)
    if as_json:
        print_json({"memory": [_memory(place) for place in memories], "fits": rows})
        return
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout

    console = stdout()
    short = {name: Path(name).name for name in sizes} if model is not None else dict(zip(sizes, PUBLISHED, strict=True))
    for place in memories:
        free, total, speed = place.free / 1e9, place.total / 1e9, place.bandwidth / 1e9
        title = f"{place.name} ({place.device}): {free:.1f} GB free of {total:.1f}, read at {speed:.0f} GB/s"
        console.print(Text(title))
        table = Table()
        table.add_column("model", overflow="fold", no_wrap=model is None, min_width=18 if model is None else None)
        for form in place.forms:
            table.add_column(f"{form.backend}\n{form.name}", justify="right", no_wrap=True)
        for name in sizes:
            of = {
                (row["backend"], row["form"]): _cell(row)
                for row in rows
                if (row["model"], row["device"]) == (name, place.device)
            }
            table.add_row(Text(short[name]), *(of.get((form.backend, form.name), Text("-")) for form in place.forms))
        console.print(table)
    if model is None:
        console.print(
            "Qwen3-VL-2B: --model Qwen/Qwen3-VL-2B-Instruct, …; the bundled model (no --model) fits anywhere."
        )
    forms = [form for place in memories for form in place.forms]
    for line in _legend(forms, rows, mixtures=any(size.mixture for size in sizes.values())):
        console.print(line)


def _legend(forms: list[Form], rows: list[Fit], *, mixtures: bool) -> list[str]:
    """Return what the cells of `rows` mean; `mixtures` says whether some models are mixtures of experts."""
    kept = sorted({round(form.kv_share, 2) for form in forms if form.backend == "local"})
    shares = " or ".join(f"{share:.0%}" for share in kept)
    lines = [
        f"GB that must be free: weights, {OVERHEAD / 1e9:g} GB, and as much that"
        f" {SHORTEST_CONTEXT:,} tokens of KV fit into what the backend gives to it: local {shares} of what is"
        " free then, openvino all."
    ]
    if not all(row["fits"] for row in rows):
        lines.append("no room is too large: so much is not free now.")
    if any(row["fits"] for row in rows):
        shares_of = ", ".join(
            f"{form.share:.0%} ({form.backend} {form.name}: {'measured here' if form.measured else 'assumed'})"
            for form in forms
        )
        what = "about so many tokens a second, for one answer: what reading the weights allows"
        lines.append(f"~: {what}, times {shares_of}.")
    if any(row["form"] == "float32" and row["fits"] for row in rows):
        lines.append("float32 is read from copies in 16 bits where there is memory for them, else at half the speed.")
    if mixtures and not all(form.mixtures for form in forms):
        lines.append("-: this form takes no mixture of experts.")
    if any(form.backend == "openvino" for form in forms):
        lines.append("openvino runs a folder that optimum-intel converted to this form: --model openvino:FOLDER.")
    return lines


def _cell(row: Fit) -> Text:
    from rich.text import Text

    if not row["fits"]:
        return Text(f"{_few_digits(row['memory_gb'])} GB\nno room", style="dim")
    return Text(f"{_few_digits(row['memory_gb'])} GB\n~{row['tokens_per_second']:g}/s")


def _few_digits(gigabytes: float) -> str:
    """Return a number that leaves room for others at 80 columns."""
    return f"{gigabytes:.0f}" if gigabytes >= 100 else f"{gigabytes:.1f}"


def _memory(place: Place) -> Memory:
    return {
        "device": place.device,
        "name": place.name,
        "free_gb": round(place.free / 1e9, 1),
        "total_gb": round(place.total / 1e9, 1),
        "bandwidth_gb_s": round(place.bandwidth / 1e9, 1),
    }


def bundled() -> Bundled:
    """Return the bundled checkpoint with its folder, its size in bytes, and True if its weights are present."""
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
    models: list[LocalModel] = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model" and "qwen3-vl" in repo.repo_id.lower():
            how, readable = _quantisation(revision.snapshot_path for revision in repo.revisions)
            models.append(
                {
                    "model": repo.repo_id,
                    "path": str(repo.repo_path),
                    "bytes": repo.size_on_disk,
                    "quantisation": how,
                    "readable": readable,
                }
            )
    return models


def _quantisation(snapshots: Iterable[Path]) -> tuple[str | None, bool]:
    """Return the quantisation of a repository's weights (None: not quantised, or unknown), and if `local` reads it."""
    from qvl.backends.local.model.checkpoint_files import quantisation, read_json
    from qvl.backends.local.model.weight_form import readable
    from qvl.errors import ConfigError

    for folder in snapshots:
        try:
            config = read_json(folder / "config.json", folder.name)
            return quantisation(folder, config), readable(folder, config)
        except (ConfigError, OSError):
            continue
    return None, True


def published() -> list[PublishedModel]:
    """Return every published size with the memory it needs in bfloat16 on a CPU, in GB, as `fit` does."""
    return [
        {
            "model": published_id(name),
            "size": re.sub(r"^Qwen3(-VL|\.5)-", "", name),
            "parameters": round(size.parameters / 1e9, 1),
            "active": float(name.partition("-A")[2].rstrip("B")) if "-A" in name else None,
            "weights_gb": round(size.parameters * 2 / 1e9, 1),
            "memory_gb": round(memory_of(size, in_16_bits(), "cpu")[1] / 1e9, 1),
        }
        for name, size in PUBLISHED.items()
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
