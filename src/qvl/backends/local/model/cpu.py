"""The processor's name and those of its instruction sets that decide which kernel is right. No torch."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path


@cache
def cpu_info() -> str:
    """Return the first processor's part of /proc/cpuinfo, or an empty text on other systems than Linux."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0]
    except OSError:
        return ""


def cpu_name() -> str:
    """Return the processor's name, family and model; in a virtual machine the name may be the vendor's alone."""
    fields = dict(re.findall(r"^(model name|cpu family|model|CPU part)\s*: (.*)$", cpu_info(), re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return " ".join([name, *(fields[field] for field in ("cpu family", "model", "CPU part") if field in fields)])


def has_bfloat16() -> bool:
    """True if the processor has instructions for products of bfloat16."""
    return re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpu_info()) is not None


def has_vnni() -> bool:
    """True if products of 8-bit integers are summed in 32 bits without saturation; on x86 by VNNI or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return re.search(r"\b(avx512_vnni|avx_vnni|amx_int8)\b", cpu_info()) is not None


@cache
def has_fast_bfloat16_attention() -> bool:
    """True unless torch's attention is faster in float32 than in bfloat16: on x86 without AMX it is."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return re.search(r"\bamx_bf16\b", cpu_info()) is not None
