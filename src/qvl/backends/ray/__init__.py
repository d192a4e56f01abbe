"""Engines on every device of a host, or of many, under Ray: Serve for requests, Data for datasets."""
