"""Product catalogues: reading of files, indexing, ranking, and search by customers' wishes."""
