"""Writes docs/ascend-chips.md from the table of chips, so that the page says what doctor and launch do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.ascend.chips import CHIPS, Chip

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE: Final = Path(__file__).parents[2] / "docs" / "ascend-chips.md"
_HEAD: Final = """# Ascend chips

Made by `make docs` from the table that `qvl doctor` and `qvl launch` read (`ascend/chips.py`). The facts are those of
vllm-ascend's pages and of the published source of npu-smi; no chip was at hand. How much memory a chip has is not here:
`npu-smi info` tells it.

| chip | products | computes in | image tag | Qwen3-VL from vllm-ascend | remarks |
|---|---|---|---|---|---|
"""


def page() -> str:
    """Return the page: a table of all chips, and a section with nodes and mounts of each that is supported."""
    rows = "".join(f"| {' | '.join(_cells(chip))} |\n" for chip in CHIPS)
    return _HEAD + rows + "".join(_section(chip) for chip in CHIPS if chip.supported)


def _cells(chip: Chip) -> list[str]:
    endings = " or ".join(f"`-{suffix}`" if suffix else "no ending" for suffix in chip.image_suffixes)
    return [chip.kind, chip.products, ", ".join(chip.dtypes), endings, chip.serves_from, _remarks(chip)]


def _remarks(chip: Chip) -> str:
    remarks = [chip.why_not]
    remarks += [f"{chip.dies} dies a card, used together"] if chip.dies > 1 else []
    remarks += [f"graphs from CANN {chip.graph_cann}, below it `--enforce-eager`"] if chip.graph_cann else []
    if chip.shm != "1g":
        remarks.append(f"context {chip.max_model_len}, {chip.max_num_seqs} requests at once, `--shm-size {chip.shm}`")
    remarks += [f"served with quantised weights ({chip.quantisation})"] if chip.quantisation else []
    return "; ".join(filter(None, remarks))


def _section(chip: Chip) -> str:
    lines = [f"\n## {chip.kind}\n\n", f"- nodes: {_code(f'/dev/{node}' for node in chip.control_nodes)}\n"]
    if chip.optional_nodes:
        lines.append(f"- nodes where the host has them: {_code(f'/dev/{node}' for node in chip.optional_nodes)}\n")
    lines.append(f"- mounts: {_code(chip.mounts)}\n")
    for target, places in chip.placed_mounts:
        lines.append(f"- mounted at `{target}`, from the first that there is of {_code(places)}\n")
    if chip.optional_mounts:
        lines.append(f"- mounts where the host has them: {_code(chip.optional_mounts)}\n")
    if chip.entrypoint:
        lines.append(f"- starts by the image's `{chip.entrypoint}`\n")
    lines.append(f"- privileged: {'as the vendor runs it' if chip.privileged else 'no'}\n")
    return "".join(lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
