"""Runs Qwen3-VL in this process: a continuous-batching engine over transformers' own modules.

`backend` (the seam) puts requests through `processor` into `engine`, whose thread asks `scheduler` what to run,
lets `runner` run it, and hands tokens back through `output`. What is only accounting (`sequence`, `scheduler`,
`kv_cache`, `prefix`) holds no torch; what touches a device goes through `device`.
"""
