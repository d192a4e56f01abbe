"""What one test does to the process that runs it does not reach the next."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from typer.testing import CliRunner

from qvl.cli import app
from qvl.log import configure, logger
from tests.conftest import own_logs


def test_a_command_run_in_this_process_leaves_no_log_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("qvl").handlers.clear()
    with own_logs():
        assert CliRunner().invoke(app, ["cache", "path"]).exit_code == 0
        assert logging.getLogger("qvl").handlers
        assert not logging.logThreads
    assert not logging.getLogger("qvl").handlers
    assert logging.getLogger("qvl").propagate
    assert logging.logThreads
    # Its handler would write to a stderr that is closed by now, and logging would complain about that on this one.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger("qvl.isolation").warning("after it")
    assert "Logging error" not in sys.stderr.getvalue()


def test_a_level_below_qvl_ends_with_its_test() -> None:
    known, new = logging.getLogger("qvl.isolation"), "qvl.isolation.new"
    known.setLevel(logging.ERROR)
    with own_logs():
        configure(level="debug")
        known.setLevel(logging.DEBUG)
        logging.getLogger(new).setLevel(logging.DEBUG)
    assert known.level == logging.ERROR
    assert logging.getLogger(new).level == logging.NOTSET
