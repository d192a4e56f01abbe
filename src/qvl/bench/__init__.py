"""`qvl bench`: a load client for OpenAI-compatible endpoints that verifies its own measurements.

`dataset` reads items, `prepare` makes request bodies of them, `exchange` sends one, `load` schedules them, `record`
stores the outcomes, `metrics` and `pairs` compute figures from records, `report` and `page` show them, and `run` does
a whole run.
"""
