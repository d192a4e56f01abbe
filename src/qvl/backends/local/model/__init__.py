"""The model on a device: transformers' weights, loops of ours."""
