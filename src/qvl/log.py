"""Structured logs: structlog's events over the standard library's loggers.

A library must not decide where logs go, so `logger()` only hands events to `logging`; warnings reach stderr by
Python's own last resort. `configure()` is for programs: the CLI and the server call it once.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def logger(name: str) -> Any:
    """A structlog logger under `name` that honours levels and handlers of `logging`."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        cache_logger_on_first_use=False,
    )


def configure(*, level: str = "warning", json: bool = False) -> None:
    """Sends the logs of qvl to stderr, as JSON lines or for people. Calling it again replaces the handler."""
    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
        )
    )
    root = logging.getLogger("qvl")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
