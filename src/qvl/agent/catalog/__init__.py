"""Products: read from files, indexed, ranked, and searched by the wishes of customers."""
