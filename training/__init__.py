"""Training of the bundled model from scratch: `python -m training.train --out DIR`."""
