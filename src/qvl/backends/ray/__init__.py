"""Engines on every device of one or many hosts by Ray: Serve for requests, Data for datasets."""
