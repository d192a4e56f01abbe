"""Runs mixed requests on the fake NPU and on the CPU and compares; started by test_npu.py in a process of its own.

    run_engine.py COUNT [setting=value ...]

`random` takes a random-weight model, whose every token depends on all before it, in place of the bundled one, `hybrid`
a Qwen3.5 of that kind; `lora` has every other request answered by an adapter; `two-cards` spreads the model over npu:0
and npu:1. Prints "equal COUNT" and, as JSON, what was counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[4])]

import transformers  # noqa: E402 - the paths come first

from qvl.backends.local.backend import LocalBackend  # noqa: E402 - the paths come first
from qvl.types import ResponseFormat, Result  # noqa: E402
from tests.backends.local.checkpoints import random_checkpoint, random_hybrid  # noqa: E402 - the paths come first
from tests.backends.local.requests import ask, mixed  # noqa: E402
from tests.backends.lora_files import random_adapter  # noqa: E402 - the paths come first

TWO_CARDS = {
    "model.visual": 1,
    "model.language_model.embed_tokens": 0,
    "model.language_model.layers.0": 0,
    "model.language_model.layers.1": 0,
    "model.language_model.layers": 1,
    "model.language_model.norm": 1,
    "model.language_model.rotary_emb": 0,
    "lm_head": 0,
}


def answers(model: str | None, device: str, count: int, **settings: Any) -> tuple[list[Result], dict[str, float], str]:
    async def run() -> tuple[list[Result], dict[str, float], str]:
        settings.setdefault("kv_cache_bytes", 64 << 20 if "hybrid" in sys.argv else 16 << 20)
        async with LocalBackend(model, device=device, dtype="float32", **settings) as backend:
            wanted = mixed(count, random.Random(5))
            wanted += [
                ask(1, "Describe the picture.", temperature=1.2, top_k=9, top_p=0.9, min_p=0.01, seed=3, n=2),
                ask(2, "x", repetition_penalty=1.3, presence_penalty=0.5, logprobs=3),
                ask(3, "x", max_tokens=30).replace(response_format=ResponseFormat("choice", choices=("mug", "bag"))),
                ask("Say hello.", max_tokens=40, ignore_eos=True),
            ]
            if "lora" in sys.argv:
                wanted = [request.replace(adapter="shelf" * (at % 2)) for at, request in enumerate(wanted)]
            results = await asyncio.gather(*(backend.generate(request) for request in wanted))
            again = await asyncio.gather(*(backend.generate(request) for request in wanted[:4]))
            assert [r.text for r in again] == [r.text for r in results[:4]]
            return list(results), dict(backend.stats()), backend.describe()

    return asyncio.run(run())


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    number = int(sys.argv[1])
    wishes: dict[str, Any] = dict(word.split("=") for word in sys.argv[2:] if "=" in word)
    if "two-cards" in sys.argv:
        wishes["device_map"] = TWO_CARDS
    with TemporaryDirectory() as place:
        makes = {"random": random_checkpoint, "hybrid": random_hybrid}
        model = next((str(make(Path(place))) for name, make in makes.items() if name in sys.argv), None)
        more: dict[str, Any] = {}
        if "lora" in sys.argv:
            more["adapter"] = {"shelf": str(random_adapter(Path(place) / "adapter", seed=1))}
        there, _, _ = answers(model, "cpu", number, **more)
        here, counted, described = answers(model, "auto", number, **wishes, **more)
    assert described.startswith("npu:0 (Ascend"), described
    assert [[c.text for c in r.choices] for r in here] == [[c.text for c in r.choices] for r in there]
    assert [r.usage.completion_tokens for r in here] == [r.usage.completion_tokens for r in there]
    import torch_npu

    print("equal", len(here))
    print(json.dumps({**counted, **torch_npu.PLAYED}))
