"""The longest time of picture decoders that cannot be interrupted: noise, as large as the default limits allow.

python benchmarks/bench_decoders.py
"""

from __future__ import annotations

import io
import time

import numpy as np
from PIL import Image

from qvl import media
from qvl.media.policy import MediaPolicy

CASES = (
    ("WEBP", {"lossless": True, "quality": 0, "method": 0}, (4300, 3700)),
    ("AVIF", {"quality": 90, "speed": 10}, (4200, 3400)),
    ("AVIF", {"quality": 100, "speed": 10, "subsampling": "4:4:4"}, (4200, 3400)),
    ("TIFF", {"compression": "tiff_lzw"}, (6300, 5200)),
    ("TIFF", {"compression": "tiff_adobe_deflate"}, (6300, 5200)),
    ("TIFF", {"compression": "jpeg", "quality": 95}, (6300, 5200)),
)


def main() -> None:
    random = np.random.default_rng(1)
    # More bytes than the default lets in, so that pixels and memory are what bounds it.
    policy = MediaPolicy(max_bytes=256 * 2**20)
    print("| form | megapixels | MiB | processor s | s |\n|---|---|---|---|---|")
    for form, options, (width, height) in CASES:
        out = io.BytesIO()
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(out, form, **options)
        picture = media.load(out.getvalue(), policy, decode=False)
        began, worked = time.perf_counter(), time.process_time()
        picture.rgb()
        took, worked = time.perf_counter() - began, time.process_time() - worked
        name = ", ".join([form, *map(str, options.values())])
        print(f"| {name} | {width * height / 1e6:.0f} | {out.tell() >> 20} | {worked:.1f} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
