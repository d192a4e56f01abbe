"""Headers of single requests to an endpoint: the trace context, so that its spans and ours form one trace."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

# Headers such as `traceparent`, set by whoever opened the span of this request; or what it wants of the other's cache.
CARRIED: Final[ContextVar[Mapping[str, str]]] = ContextVar("qvl.carried", default=MappingProxyType({}))
