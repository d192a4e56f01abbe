"""A scripted endpoint for a client of HTTP/1.1 to talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.scripted_endpoint import ScriptedEndpoint


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server
