"""`qvl bench`: a load client for OpenAI-compatible endpoints that checks what it claims.

`dataset` reads what to ask, `prepare` makes request bodies of it, `exchange` sends one, `load` decides when, `record`
keeps what came of it, `metrics` and `pairs` turn records into figures, `report`, `page` and `plots` show them, and
`run` leads through all of it.
"""
