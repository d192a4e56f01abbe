"""The lines that `qvl-serve` prints when it is ready."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl.server.state import ServerCore


def print_banner(core: ServerCore, address: str) -> None:
    """Print the version, model, address and an example request of a server."""
    pipeline = core.pipeline
    facts = {"backend": pipeline.backend.name, "model": ", ".join(core.names)}
    identity = pipeline.backend.identity()
    describe = getattr(pipeline.backend, "describe", None)
    device = describe() if callable(describe) else identity.get("device")
    for name, value in (("device", device), ("dtype", identity.get("dtype"))):
        if value is not None:
            facts[name] = str(value)
    facts["cache"] = "off" if core.executor.store is None else _shown_cache(core.executor.store.cache.url)
    facts["keys"] = "required" if core.keys.required else "none"
    facts["address"] = address
    lines = [f"qvl {core.version} serves", *(f"  {name:<8} {value}" for name, value in facts.items())]
    key = " -H 'Authorization: Bearer KEY'" if core.keys.required else ""
    body = '{"messages":[{"role":"user","content":"Hello"}]}'
    lines.append(f"  page     {address}/   docs {address}/docs")
    lines.append(f"  try      curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _shown_cache(url: str) -> str:
    """Return a cache URL without its password."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def shown_host(host: str) -> str:
    """Return a host as written in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
