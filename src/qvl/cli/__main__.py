"""`python -m qvl.cli`: the command `qvl` where no script was installed."""

from __future__ import annotations

from qvl.cli import main

main()
