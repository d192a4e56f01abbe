"""The model on a device: transformers' weights, run by our own forward pass."""
