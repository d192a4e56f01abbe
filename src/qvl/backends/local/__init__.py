"""Runs Qwen3-VL in this process: a continuous-batching engine over transformers' own modules.

`backend` prepares requests (`text/processor`) and posts them to `engine`, whose thread asks `scheduling/scheduler` what
to run, lets `model/model_runner` run it, and sends the tokens back as text (`text/detokenizer`).
"""
