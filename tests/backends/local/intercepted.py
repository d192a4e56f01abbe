"""A LocalBackend whose tests see each request as the engine is about to get it, and may change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvl.backends.local.backend import LocalBackend

if TYPE_CHECKING:
    from qvl.backends.local.engine_request import EngineRequest


class Intercepted(LocalBackend):
    def arrives(self, request: EngineRequest) -> None:
        raise NotImplementedError

    def _build(self, device: Any) -> Any:
        loaded = super()._build(device)
        submit = loaded.engine.mailbox.submit

        def first_seen(request: EngineRequest) -> None:
            self.arrives(request)
            submit(request)

        loaded.engine.mailbox.submit = first_seen
        return loaded
