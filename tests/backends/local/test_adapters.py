"""LoRA adapters beside the model: answers equal PEFT's, alone and with others in one batch."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from qvl import AsyncPipeline
from qvl.errors import UnsupportedInputError
from qvl.types import ResponseFormat, SamplingParams
from tests.backends.local.checkpoints import random_checkpoint, random_hybrid, random_windowed
from tests.backends.local.lora import STATES, TEXT, TOWER, LoraReference
from tests.backends.local.requests import mixed
from tests.backends.local.test_equals_generate import answer_all, check

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener

# Importing PEFT takes seconds, which every worker would spend to collect the tests.
pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="the answers are compared with PEFT's")


@dataclass
class Trained:
    """A model with three adapters, requests that name one or none, and PEFT's answers to them."""

    reference: LoraReference
    folder: Path
    adapters: dict[str, str]
    requests: list[ChatRequest]
    expected: list[list[int]]


def trained(folder: Path, kinds: dict[str, dict[str, Any]], count: int) -> Trained:
    reference = LoraReference(folder)
    adapters = {
        name: str(reference.add(name, folder / "adapters", seed=seed, **kind))
        for seed, (name, kind) in enumerate(kinds.items())
    }
    names = [None, *adapters]
    asked = mixed(count, random.Random(5))
    # Every other one asks what the one before asked, of another adapter.
    asked = [asked[number - number % 2] for number in range(count)]
    named = [names[number % len(names)] for number in range(count)]
    expected = [reference.answer(request, name) for request, name in zip(asked, named, strict=True)]
    requests = [request.replace(adapter=name or "") for request, name in zip(asked, named, strict=True)]
    return Trained(reference, folder, adapters, requests, expected)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = random_checkpoint(tmp_path_factory.mktemp("random-lora"))
    kinds: dict[str, dict[str, Any]] = {
        "text": {"target_modules": TEXT},
        "tower": {"target_modules": [*TEXT, *TOWER], "r": 6, "use_rslora": True},
        "some": {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
            "layers_to_transform": [0, 1],
        },
    }
    return trained(folder, kinds, 16)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    pytest.importorskip("transformers.models.qwen3_5", reason="this transformers does not know Qwen3.5")
    folder = random_hybrid(tmp_path_factory.mktemp("random-lora-hybrid"))
    kinds: dict[str, dict[str, Any]] = {
        "all": {"target_modules": [*TEXT, *STATES]},
        "tower": {"target_modules": [*STATES, "q_proj", "linear_fc2"], "r": 3},
    }
    return trained(folder, kinds, 9)


SETTINGS = [
    pytest.param({}, id="default"),
    pytest.param({"batch_invariant": True}, id="batch-invariant", marks=pytest.mark.slow),
    pytest.param({"prefix_cache": False, "vision_cache_bytes": 0}, id="no-caches", marks=pytest.mark.slow),
    pytest.param({"speculate": "on", "max_num_seqs": 3}, id="speculate", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_of_adapters_and_base_equals_peft(opened: Opener, dense: Trained, settings: dict[str, Any]) -> None:
    backend = opened(dense.folder, adapter=dense.adapters, max_num_batched_tokens=160, **settings)
    check(dense.reference, answer_all(backend, dense.requests), dense.expected)
    # Once more, from what the first round left: prefixes and features of pictures.
    check(dense.reference, answer_all(backend, dense.requests), dense.expected)


@pytest.mark.slow
def test_adapters_of_layers_with_states_equal_peft(opened: Opener, hybrid: Trained) -> None:
    backend = opened(hybrid.folder, adapter=hybrid.adapters, max_num_batched_tokens=160)
    check(hybrid.reference, answer_all(backend, hybrid.requests), hybrid.expected)


@pytest.mark.slow
def test_adapters_of_a_windowed_tower_equal_peft(opened: Opener, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "text": {"target_modules": TEXT},
        "tower": {"target_modules": r".*visual.*(qkv|attn.proj|gate_proj|up_proj|down_proj|mlp.0|mlp.2)"},
    }
    made = trained(random_windowed(tmp_path / "model"), kinds, 12)
    backend = opened(made.folder, adapter=made.adapters, max_num_batched_tokens=160)
    check(made.reference, answer_all(backend, made.requests), made.expected)


def test_every_adapter_changes_answers(dense: Trained) -> None:
    by_question: dict[str, set[str]] = {}
    for request, ids in zip(dense.requests, dense.expected, strict=True):
        by_question.setdefault(str(request.messages), set()).add(str(ids))
    assert all(len(answers) == 2 for answers in by_question.values())


def test_one_adapter_is_that_of_every_request(opened: Opener, dense: Trained) -> None:
    backend = opened(dense.folder, adapter=dense.adapters["tower"])
    chosen = [
        (request.replace(adapter=""), ids)
        for request, ids in zip(dense.requests, dense.expected, strict=True)
        if request.adapter == "tower"
    ]
    check(dense.reference, answer_all(backend, [request for request, _ in chosen]), [ids for _, ids in chosen])
    assert backend.adapters() == {}
    assert backend.identity()["adapter"].startswith("sha256:")


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.slow
def test_answers_are_the_same_alone_and_in_a_batch(opened: Opener, dense: Trained, quantize: str | None) -> None:
    backend = opened(dense.folder, adapter=dense.adapters, quantize=quantize)
    schema = {"type": "object", "properties": {"brand": {"type": "string", "maxLength": 6}}, "required": ["brand"]}
    form = ResponseFormat("json_schema", schema=schema)
    requests = [
        request.replace(response_format=form, sampling=SamplingParams(max_tokens=24))
        if number % 3 == 2
        else request.replace(cache_salt=str(number))
        for number, request in enumerate(dense.requests[:12])
    ]
    alone = [asyncio.run(backend.generate(request)).text for request in requests]
    assert [result.text for result in answer_all(backend, requests)] == alone
    assert backend.stats()["forced_tokens"] > 0


def test_adapters_share_no_prefix_and_the_model_has_its_own_key(dense: Trained, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncPipeline(
            str(dense.folder), adapter=dense.adapters, device="cpu", dtype="float32", kv_cache_bytes=64 << 20,
            cache=f"sqlite:///{tmp_path}/answers.db",
        ) as pipeline:  # fmt: skip
            text = "What is on the shelf? " * 12
            first = await pipeline.ask([], text, max_tokens=4)
            named = await pipeline.ask([], text, max_tokens=4, adapter="text")
            assert first.cache == named.cache == "miss"
            assert named.usage.cached_tokens == 0
            assert named.model == "text"
            assert first.key != named.key
            assert (await pipeline.ask([], text, max_tokens=4, adapter="text")).cache == "hit"
            longer = await pipeline.ask([], text + "And under it?", max_tokens=4, adapter="text")
            assert longer.usage.cached_tokens > 0
            with pytest.raises(UnsupportedInputError, match=r"has no adapter 'shelf'.*it has: text, tower, some"):
                await pipeline.ask([], text, adapter="shelf")
        async with AsyncPipeline(
            str(dense.folder), device="cpu", dtype="float32", cache=f"sqlite:///{tmp_path}/answers.db"
        ) as pipeline:
            # What the model itself answered is kept for it, with adapters beside it or without.
            assert (await pipeline.ask([], text, max_tokens=4)).cache == "hit"

    asyncio.run(run())
