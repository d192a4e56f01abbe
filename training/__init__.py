"""Makes the weights of the bundled model from nothing: `python -m training.train --out DIR`."""
