"""One contract over every backend that needs no model weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from qvl.backends.base import Backend, Capabilities
from qvl.backends.openai.backend import OpenAIBackend
from qvl.testing import BackendContract, EchoBackend, RecordingBackend, Sight
from qvl.testing.asking import square
from qvl.testing.echo import COLOURS
from tests.scripted_endpoint import Echo, ScriptedEndpoint

PAUSE = 0.002


def coloured() -> Sight:
    names = ("red", "blue", "green")
    return Sight(
        pictures={name: square(COLOURS[name]) for name in names},
        question="Name the colours.",
        names_in=lambda text: [word for word in text.replace(",", " ").split() if word in COLOURS],
    )


class SeeingContract(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return coloured()


class TestEcho(SeeingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: EchoBackend(pause=PAUSE)


class TestEchoThatCanDoNothing(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        least = Capabilities(sampling=frozenset({"max_tokens"}))
        return lambda: EchoBackend(capabilities=least, pause=PAUSE)


class TestRecording(SeeingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: RecordingBackend(EchoBackend(pause=PAUSE))


class TestOpenAI(SeeingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Iterator[Callable[[], Backend]]:
        with ScriptedEndpoint(default=Echo(PAUSE)) as endpoint:
            yield lambda: OpenAIBackend("echo", base_url=endpoint.url)


class TestOpenAIThatIgnoresAndRefuses(BackendContract):
    """As `transformers serve`: no schema, no n, no logprobs (in silence), and refuses what it does not know."""

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Iterator[Callable[[], Backend]]:
        with ScriptedEndpoint(
            default=Echo(PAUSE),
            ignores=("response_format", "n", "logprobs", "tools", "image_url"),
            refuses=("top_k", "min_p", "ignore_eos", "repetition_penalty", "stop_token_ids", "structured_outputs"),
        ) as endpoint:
            yield lambda: OpenAIBackend("echo", base_url=endpoint.url)


class TestOpenAIPool(SeeingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Iterator[Callable[[], Backend]]:
        with (
            ScriptedEndpoint(default=Echo(PAUSE)) as first,
            ScriptedEndpoint(default=Echo(PAUSE)) as second,
            ScriptedEndpoint(default=Echo(PAUSE)) as third,
        ):
            yield lambda: OpenAIBackend("echo", base_url=[first.url, second.url, third.url], policy="affinity")
