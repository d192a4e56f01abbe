"""The checks of `qvl doctor`, one chapter a file. A check is a function of the host that yields findings."""
