"""`python -m qvl.cli`: the command `qvl`, without the installed script."""

from __future__ import annotations

from qvl.cli import main

main()
