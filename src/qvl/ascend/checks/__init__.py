"""The checks of `qvl doctor`, one module per subject. A check is a generator of findings about a host."""
