"""Runs Qwen3-VL, Qwen3.5 and Qwen2.5-VL in this process: a continuous-batching engine over transformers' own modules.

`backend` prepares requests (`text/processor`) and posts them to `engine`. In its thread, `scheduling/scheduler` decides
the next step, `model/model_runner` computes it, and `text/detokenizer` turns the tokens into Chunks for the callers.
"""
