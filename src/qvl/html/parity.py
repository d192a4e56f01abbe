"""The page of `qvl parity`: where two deployments part, why, and the worst cases side by side."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qvl.html.page import page_html

if TYPE_CHECKING:
    from qvl.types import JsonMapping


def parity_html(report: JsonMapping) -> str:
    """Return the page of a report as ParityReport.to_json gives it."""
    return page_html("qvl parity", f"<h1>qvl parity</h1><p>{escape(str(report['first_layer']))}</p>")
