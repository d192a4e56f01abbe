"""qvl inside other frameworks."""
