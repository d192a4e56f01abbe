"""Structured logs: structlog's events over the standard library's loggers.

A library must not decide where logs go, so `logger()` only passes events to `logging`; warnings reach stderr by
Python's handler of last resort. `configure()` is for programs: the CLI and the server call it once.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from qvl._printable import escaped, plain

_encode: Final = jsonlib.JSONEncoder(ensure_ascii=False, default=repr).encode


class LevelledLogger(structlog.stdlib.BoundLogger):
    """Checks the level first, so that events that are not logged cost nothing."""

    def debug(self, event: str | None = None, *args: str, **fields: object) -> object:
        if self._logger.isEnabledFor(logging.DEBUG):
            return self._proxy_to_logger("debug", event, *args, **fields)
        return None

    def info(self, event: str | None = None, *args: str, **fields: object) -> object:
        if self._logger.isEnabledFor(logging.INFO):
            return self._proxy_to_logger("info", event, *args, **fields)
        return None


def logger(name: str) -> Any:
    """Return a structlog logger `name` that uses the levels and handlers of `logging`."""
    wrapped = structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=LevelledLogger,
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
    # Bound here, or it would be made anew for every line.
    return wrapped.bind()


class JsonLines(logging.Formatter):
    """Formats each record, structlog's or not, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, dict):
            return escaped(_encode(record.msg))
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "timestamp": moment.isoformat().replace("+00:00", "Z"),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return escaped(_encode(line))


def _plain_texts(logger: object, method: str, event: MutableMapping[str, object]) -> dict[str, object]:
    return {name: plain(value) if isinstance(value, str) else value for name, value in event.items()}


def configure(*, level: str = "warning", json: bool = False) -> None:
    """Send the logs of qvl to stderr, as text or JSON lines. Calling it again replaces the handler."""
    # What no format of ours shows need not be found out for every line (logging's own advice).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    if json:
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    _plain_texts,
                    structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
                ],
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
