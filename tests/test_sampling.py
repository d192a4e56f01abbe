"""A sampling parameter is declared in one place, and everything that must know of it does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qvl.errors import ConfigError
from qvl.pipeline.parse_request import sampling_params
from qvl.sampling import PARAMETERS, SamplingParams

DECLARED = "    n: Annotated[int, Parameter("
MADE_UP = '    sharpness: Annotated[float, Parameter("from 0 to 4", 0.5, 0.0, 4.0, about="Made up.")] = 0.0\n'
USES = """
import asyncio, importlib.util, json, sys
from pathlib import Path

# qvl.sampling as it would be with one line more.
spec = importlib.util.find_spec("qvl.sampling")
source = Path(spec.origin).read_text(encoding="utf-8")
assert source.count(sys.argv[1]) == 1
module = importlib.util.module_from_spec(spec)
sys.modules["qvl.sampling"] = module
exec(compile(source.replace(sys.argv[1], sys.argv[2] + sys.argv[1]), spec.origin, "exec"), module.__dict__)

from dataclasses import replace

import httpx
import pytest

from qvl.backends.openai.probe_features import ACCEPTED
from qvl.backends.openai.wire import Dialect, request_body
from qvl.bench.apis import CHAT_FIELDS
from qvl.caches.key import build_manifest, hash_manifest
from qvl.errors import ConfigError, UnsupportedInputError
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.parse_request import sampling_params
from qvl.server import ServerSettings, create_app
from qvl.server.neutral_fields import without_neutral
from qvl.testing import EchoBackend
from qvl.testing.asking import ask

request = ask("x", sharpness=2)
assert request.sampling.sharpness == 2.0 and type(request.sampling.sharpness) is float
with pytest.raises(ConfigError, match="sharpness=5.0 is out of range.*from 0 to 4"):
    sampling_params({"sharpness": 5})
with pytest.raises(ConfigError, match="did you mean 'sharpness'|sharpness"):
    sampling_params({"sharpnes": 1})

keys = {hash_manifest(build_manifest(ask("x", sharpness=value), identity={}, max_pixels=1)) for value in (0, 1, 2)}
assert len(keys) == 3

assert json.loads(b"".join(request_body(request, "m", Dialect())))["sharpness"] == 2.0
assert "sharpness" not in json.loads(b"".join(request_body(ask("x"), "m", Dialect())))
assert ACCEPTED["sharpness"] == {"sharpness": 0.5}
assert "sharpness" in CHAT_FIELDS
assert without_neutral({"sharpness": 0}, passed_on=False) == {}


class Sharp(EchoBackend):
    @property
    def capabilities(self):
        have = super().capabilities
        return replace(have, sampling=have.sampling | {"sharpness"})

    def peek_capabilities(self):
        return self.capabilities


async def main():
    plain = EchoBackend()
    async with plain:
        with pytest.raises(UnsupportedInputError, match="does not support sharpness"):
            await plain.generate(request)
    for backend, value, status in ((Sharp(), 2, 200), (Sharp(), 9, 400), (EchoBackend(), 2, 400)):
        pipeline = AsyncPipeline(backend=backend, cache="off")
        app = create_app(pipeline, ServerSettings(canary=False))
        transport = httpx.ASGITransport(app)
        client = httpx.AsyncClient(transport=transport, base_url="http://x")
        async with app.router.lifespan_context(app), client as http:
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            body = {"messages": [{"role": "user", "content": "x"}], "sharpness": value}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == status, answer.text
            assert status == 200 or answer.json()["error"]["param"] == "sharpness"
            schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
            assert schemas["ChatCompletionRequest"]["properties"]["sharpness"]["description"] == "Made up."


asyncio.run(main())
"""


def test_one_line_declares_a_parameter_for_all_who_must_know_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", USES, DECLARED, MADE_UP], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("fields", [{"temperature": None}, {"n": None}, {"stop": (5,)}, {"top_k": 1.5}, {"top_p": "1"}])
def test_a_value_of_another_type_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        SamplingParams(**fields)
    if None not in fields.values():
        with pytest.raises(ConfigError, match="wrong type"):
            sampling_params(fields)


def test_every_example_is_in_its_range_and_no_default() -> None:
    """What backends and endpoints are asked with must be a value that they can be seen to honour."""
    for name, known in PARAMETERS.items():
        assert SamplingParams(**{name: known.example}).changed() == {name: known.example}
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1) == SamplingParams()


def test_one_text_is_a_stop_and_no_list_of_ids() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    with pytest.raises(ConfigError, match="at most 1024"):
        SamplingParams(stop_token_ids="1" * 1025)  # type: ignore[arg-type]
