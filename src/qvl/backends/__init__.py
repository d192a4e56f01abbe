"""Backends: each runs one chat request on a model and streams the answer."""
