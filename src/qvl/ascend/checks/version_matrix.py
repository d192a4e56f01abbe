"""The check of the version matrix itself: where it is from, and whether it is old."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from qvl.ascend import matrix
from qvl.ascend.report import Finding


def age(today: datetime.date | None = None) -> Iterator[Finding]:
    """Report date and origin of the matrix; warn if it is older than 90 days, or of a day to come."""
    table = matrix.load()
    days = table.age(today)
    detail = {"date": table.date, "origin": table.origin, "days": days, "sources": table.sources}
    if days < 0:
        yield Finding.warn(
            "matrix",
            f"the version matrix is of {table.date}, {-days} days from now ({table.origin}): it cannot be seen to age",
            "set the clock if it is wrong, else correct `date` of that matrix",
            detail,
        )
        return
    if days <= matrix.STALE_DAYS:
        yield Finding.ok("matrix", f"version matrix of {table.date}: {table.origin}", detail)
        return
    yield Finding.warn(
        "matrix",
        f"the version matrix is {days} days old ({table.date}, {table.origin}): newer releases are not in it",
        "qvl doctor --matrix FILE|URL with a newer matrix.json, or a newer version of qvl",
        detail,
    )
