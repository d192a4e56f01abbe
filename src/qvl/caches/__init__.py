"""Caches: each keeps finished answers under a key."""
