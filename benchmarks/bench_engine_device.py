"""Decoding speed on a GPU or NPU as a share of the memory bandwidth bound, in the shapes of Qwen3-VL-2B and 8B.

A decode step reads every weight of the language model and its output layer once, and the keys and values of all running
sequences; those bytes over the time of a step, as a share of the device's memory bandwidth, is what decode reaches of
its bound. Weights are random, pictures 448 x 448, and beside the engine stands transformers' `generate` on one static
batch of the same size.

    python benchmarks/bench_engine_device.py --shape 8b [--clients 1 8 32 128] [--peak-gb-s 4800]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from bench_engine_checkpoint import SHAPES, write
from PIL import Image

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_folder import bundled_folder
from qvl.media.gate import load
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart

QUESTION: Final = "Describe this picture in detail."
# GB/s, from the vendors' data sheets; the longest name that is part of the device's counts.
PEAKS: Final = {
    "H200": 4800, "H100 NVL": 3900, "H100 PCIe": 2000, "H100": 3350, "H20": 4000, "B200": 8000,
    "A100-SXM4-80GB": 2039, "A100 80GB": 1935, "A100": 1555, "A10": 600, "L40S": 864, "L40": 864, "L4": 300,
    "T4": 320, "V100": 900, "RTX 4090": 1008, "RTX 3090": 936, "Ascend910B": 1600, "Ascend910_93": 3200,
}  # fmt: skip
# GiB of device memory that weights, KV and work space take at 128 clients.
NEEDS: Final = {"2b": 12, "8b": 36}


def weight_bytes(text: dict[str, Any], itemsize: int) -> int:
    """Bytes of weights that a decode step reads: layers, last norm, output layer; of the embeddings next to nothing."""
    hidden, heads, size = text["hidden_size"], text["num_attention_heads"], text["head_dim"]
    projections = hidden * size * (2 * heads + 2 * text["num_key_value_heads"])
    layer = projections + 3 * hidden * text["intermediate_size"] + 2 * hidden + 2 * size
    return itemsize * (text["num_hidden_layers"] * layer + hidden + hidden * text["vocab_size"])


def kv_bytes(text: dict[str, Any], itemsize: int, contexts: list[int]) -> int:
    """Bytes of keys and values that a step reads for sequences of these lengths."""
    token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * itemsize
    return token * sum(contexts)


def share(text: dict[str, Any], itemsize: int, contexts: list[int], seconds: float, peak: float) -> float:
    """What a step of `seconds` reaches of `peak` bytes/s."""
    return (weight_bytes(text, itemsize) + kv_bytes(text, itemsize, contexts)) / seconds / peak


def known_peak(name: str) -> float | None:
    """Bytes/s of the device called `name`, or None."""
    plain = name.lower().replace("-", " ")
    matches = [known for known in PEAKS if known.lower().replace("-", " ") in plain]
    return PEAKS[max(matches, key=len)] * 1e9 if matches else None


def measured_peak(device: Any) -> float:
    """Bytes/s of copying a large tensor on the device, reads and writes counted."""
    import torch

    source = torch.zeros(256 << 20 if device.type != "cpu" else 64 << 20, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        device.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def request(seed: int, tokens: int) -> ChatRequest:
    noise = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    picture = ImagePart(load(Image.fromarray(noise).resize((448, 448))))
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return ChatRequest((Message("user", (picture, TextPart(QUESTION))),), sampling)


async def engine(backend: LocalBackend, clients: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """All clients at once, each with a picture of its own that follows from `seed`.

    The step is the median time between tokens while all of them decode.
    """
    prompt = 0

    async def one(number: int) -> list[float]:
        nonlocal prompt
        times = []
        async for chunk in backend.stream(request(seed + 1000 * clients + number, tokens)):
            times.append(time.perf_counter())
            prompt = chunk.usage.prompt_tokens if chunk.usage else prompt
        return times

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(number) for number in range(clients)))
    seconds = max(times[-1] for times in answers) - began
    first, last = max(times[0] for times in answers), min(times[-1] for times in answers)
    gaps = [b - a for times in answers for a, b in itertools.pairwise(times) if a >= first and b <= last]
    return {
        "tokens_per_s": clients * tokens / seconds,
        "ttft_p50": statistics.median(times[0] - began for times in answers),
        "step": statistics.median(gaps) if gaps else float("nan"),
        "prompt": prompt,
    }


def generate(backend: LocalBackend, folder: Path, clients: int, tokens: int) -> dict[str, float]:
    """transformers' own model on a batch of `clients` equal prompts: with 2 tokens and with all; the rest is decode."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from qvl.backends.local.model.device import open_device
    from qvl.backends.local.text.processor import ImageRules, Processor

    device = open_device(backend._device, backend._dtype)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=device.dtype).to(device.torch).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    rules = ImageRules.read(json.loads((folder / "preprocessor_config.json").read_text()))
    prepared = Processor(tokenizer, rules, model.config.image_token_id).prepare(request(7, tokens))
    (picture,) = prepared.pictures
    rows, columns = picture.grid
    size, merge = rules.patch_size, rules.merge_size
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1).float() / 127.5 - 1
    cut = pixels.view(3, rows // merge, merge, size, columns // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
    patches = cut.unsqueeze(5).expand(*cut.shape[:5], 2, size, size).reshape(rows * columns, -1)
    ids = torch.tensor([prepared.tokens] * clients, device=device.torch)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches.repeat(clients, 1).to(device.torch, device.dtype),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * clients, device=device.torch),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }

    def run(count: int) -> float:
        device.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        device.synchronize()
        return time.perf_counter() - began

    run(2)
    short, whole = run(2), run(tokens)
    return {"tokens_per_s": clients * tokens / whole, "step": (whole - short) / (tokens - 2)}


def accelerator(shape: str, device: str) -> Any:
    """The device to measure on; ends with status 2 and one line where there is none."""
    from qvl.backends.local.model.device import open_device
    from qvl.errors import QvlError

    try:
        opened = open_device(device)
    except QvlError as exc:
        sys.exit(_needs(shape, str(exc)))
    if opened.type == "cpu" and device != "cpu":
        sys.exit(_needs(shape, "torch sees none here"))
    return opened


def _needs(shape: str, why: str) -> int:
    print(
        f"needs a GPU or NPU with {NEEDS.get(shape, 1)} GiB of memory for {shape}: {why}; "
        "--device cpu --shape 130m tries the script itself",
        file=sys.stderr,
    )
    return 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "bundled"], nargs="+", default=["2b", "8b"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peak-gb-s", type=float, help="the device's memory bandwidth; by its name when left out")
    parser.add_argument("--skip-generate", action="store_true")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the engine's backend")
    parser.add_argument("--out", type=Path, default=Path("build/bench-engine/device.json"))
    arguments = parser.parse_args()
    device = accelerator(arguments.shape[-1], arguments.device)
    peak, source = (arguments.peak_gb_s or 0) * 1e9, "given"
    if not peak:
        peak, source = known_peak(device.name) or 0.0, "data sheet"
    if not peak:
        peak, source = measured_peak(device), "measured by copying"
    report: dict[str, Any] = {"device": device.describe(), "peak_gb_s": peak / 1e9, "peak": source, "rows": []}
    print(f"{device.describe()}; memory bandwidth {peak / 1e9:.0f} GB/s ({source})")
    print("| shape | clients | tokens/s | first token | step | of the bound | generate tokens/s | its step | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    options = {name: json.loads(value) for name, _, value in (option.partition("=") for option in arguments.option)}
    for shape in arguments.shape:
        rows = measure(shape, arguments, peak, options)
        report["rows"] += rows
        for row in rows:
            print(line(row), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def measure(shape: str, arguments: argparse.Namespace, peak: float, options: dict[str, Any]) -> list[dict[str, Any]]:
    folder = bundled_folder() if shape == "bundled" else write(Path("build") / f"bench-{shape}", shape)
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    backend = LocalBackend(
        str(folder),
        device=arguments.device,
        dtype=arguments.dtype,
        max_num_seqs=max(arguments.clients),
        max_model_len=2048,
        **options,
    )

    async def run() -> list[dict[str, Any]]:
        rows = []
        async with backend:
            itemsize = backend._loaded.device.dtype.itemsize  # type: ignore[union-attr]
            await engine(backend, 2, 16)
            for clients in arguments.clients:
                # Other pictures: those that are known already would cost nothing.
                await engine(backend, clients, 8, seed=500_000)
                measured = await engine(backend, clients, arguments.tokens)
                contexts = [measured["prompt"] + arguments.tokens // 2] * clients
                measured["share"] = share(text, itemsize, contexts, measured["step"], peak)
                rows.append({"shape": shape, "clients": clients, **measured})
        return rows

    rows = asyncio.run(run())
    for row in () if arguments.skip_generate else rows:
        row["generate"] = generate(backend, folder, row["clients"], arguments.tokens)
    return rows


def line(row: dict[str, Any]) -> str:
    cells = [row["shape"], f"{row['clients']}", f"{row['tokens_per_s']:.0f}", f"{row['ttft_p50'] * 1e3:.0f} ms",
             f"{row['step'] * 1e3:.2f} ms", f"{row['share']:.0%}"]  # fmt: skip
    plain = row.get("generate")
    if plain:
        ratio = row["tokens_per_s"] / plain["tokens_per_s"]
        cells += [f"{plain['tokens_per_s']:.0f}", f"{plain['step'] * 1e3:.2f} ms", f"{ratio:.2f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
