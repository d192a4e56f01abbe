"""Texts and headers that are cheap to send and dear to read: bounded, or read beside the event loop."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import subprocess
import sys
import threading
import zlib
from urllib.parse import quote_from_bytes

import pytest
from PIL import Image

from qvl import media
from qvl.errors import MediaError
from qvl.media import image_header
from qvl.media.policy import MediaPolicy


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, "PNG")
    return out.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PROFILE = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**20)))
BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{' '.join(BASE64)}\n",
        f"data:image/png;base64,{BASE64[:40]}\u00a0{BASE64[40:]}",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        f"data:image/png;base64,{BASE64.replace('+', '-').replace('/', '_').rstrip('=')}",
        f"data:image/png,{quote_from_bytes(png())}",
        f"data:image/png,{''.join(f'%{byte:02x}' for byte in png())}",
    ],
)
def test_a_data_url_is_read_as_it_is_written(url: str) -> None:
    assert media.load(url).sha256 == media.load(png()).sha256


@pytest.mark.parametrize("ahead", range(4))
def test_no_percent_sign_is_cut_from_its_digits(ahead: int) -> None:
    out = io.BytesIO()
    Image.effect_noise((160, 160), 90).save(out, "PNG", compress_level=0)
    text = "".join(f"%{byte:02X}" for byte in out.getvalue())
    # A label of another length moves every piece by that much; what stands plain moves the text itself.
    plain = quote_from_bytes(out.getvalue()[: 40 + ahead])
    assert media.load(f"data:image/png,{plain}{text[3 * (40 + ahead) :]}").sha256 == media.load(out.getvalue()).sha256


MEASURE = """
import resource, sys
from qvl import media
from qvl.errors import MediaError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
url = {url}
before = peak()
try:
    media.load(url)
except MediaError:
    pass
print(peak() - before)
"""


@pytest.mark.parametrize(
    "url",
    [
        "'data:image/png,' + '%41' * 10_000_000",
        "'data:image/png;base64,' + '%41' * 10_000_000",
        "'data:image/png;base64,' + 'AB ' * 10_000_000",
        "'data:' + ';' * 30_000_000 + ','",
    ],
)
@pytest.mark.slow
def test_no_spelling_of_a_data_url_takes_many_times_its_length(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(url=url)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) <= 150


def test_a_png_has_one_profile_and_few_compressed_texts() -> None:
    data = png()
    media.load(data[:33] + PROFILE + data[33:], decode=False)
    with pytest.raises(MediaError, match="1 colour profile"):
        media.load(data[:33] + 2 * PROFILE + data[33:], decode=False)
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x"))
    media.load(data[:33] + 16 * text + data[33:], decode=False)
    with pytest.raises(MediaError, match="16 compressed texts"):
        media.load(data[:33] + 17 * text + data[33:], decode=False)


def tiff() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "beside"),
    [(png(), False), (png()[:33] + PROFILE + png()[33:], True), (tiff(), True)],
    ids=["png", "profile", "tiff"],
)
def test_what_may_be_dear_to_open_is_opened_beside_the_loop(
    data: bytes, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    probe = image_header.probe

    def noted(data: bytes, policy: MediaPolicy, name: str) -> image_header.Header:
        threads.append(threading.current_thread())
        return probe(data, policy, name)

    monkeypatch.setattr(image_header, "probe", noted)
    asyncio.run(media.aload(data, decode=False))
    assert [thread is not threading.main_thread() for thread in threads] == [beside]
