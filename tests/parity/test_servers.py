"""Servers that answer otherwise: penalties, limits, stops, company in the batch, cached prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from qvl import Pipeline
from qvl.backends.local.backend import LocalBackend
from qvl.parity import Case, compare
from qvl.types import ChatRequest
from tests.parity.own_minds import OwnMindBackend, ShorteningBackend
from tests.server.conftest import Running, serve
from tests.server.echo_backend import EchoBackend

__all__ = ["serve"]


class PenalizingBackend(OwnMindBackend):
    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {"repetition_penalty": 3.0}


class StoppingBackend(OwnMindBackend):
    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {"stop": (" ",)}


class CrowdedBackend(OwnMindBackend):
    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {"logit_bias": {100: 90.0}, "max_tokens": 4} if self.running > 1 else {}


class RememberingBackend(OwnMindBackend):
    seen: frozenset[str] = frozenset()

    def changes(self, request: ChatRequest) -> dict[str, object]:
        known = bool(request.cache_salt) and request.cache_salt in self.seen
        self.seen |= {request.cache_salt}
        return {"logit_bias": {100: 90.0}, "max_tokens": 4} if known or not request.cache_salt else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (PenalizingBackend, "penalty"),
        (ShorteningBackend, "length"),
        (StoppingBackend, "stop"),
        (CrowdedBackend, "batch"),
        (RememberingBackend, "prefix-cache"),
    ],
)
def test_what_a_server_does_by_itself_is_named(
    local: Pipeline, cases: list[Case], kind: type[OwnMindBackend], named: str
) -> None:
    texts = [dataclasses.replace(case, question="Describe this picture.") for case in cases if case.kind == "text"]
    with Pipeline(backend=kind(LocalBackend(device="cpu", dtype="float32")), cache="off") as other:
        report = compare(local, other, texts)
    assert report.layer is not None
    assert named in [cause.name for cause in report.causes if cause.certain], report.causes


def test_an_endpoint_does_not_answer_from_its_cache(serve: Callable[..., Running]) -> None:
    """Else a server that samples would repeat itself, and one that was repaired would answer as before."""
    running = serve(EchoBackend(), cache="memory:")
    asked = [Case("one", question="Question?")]
    with Pipeline("openai:echo-vl", base_url=f"{running.url}/v1", cache="off", api_key="x") as pipe:
        pipe.ask([], "Question?", temperature=0)
        compare(pipe, pipe, asked)
        compare(pipe, pipe, asked)
    assert sum(request.messages[-1].text == "Question?" for request in running.backend.requests) == 5
