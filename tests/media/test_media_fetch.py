"""Fetching: from a real web server, and never from inside."""

from __future__ import annotations

import functools
import ipaddress
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl import media
from qvl.errors import MediaError
from qvl.media import fetch
from qvl.media.fetch import Fetcher, is_public, literal, public_name
from qvl.media.policy import MediaPolicy

HERE = MediaPolicy(allowed_private=("127.0.0.1",), timeout=10)


class Names:
    """A resolver that knows a fixed table, and remembers what it was asked."""

    def __init__(self, **table: Sequence[str]) -> None:
        self.table = {name.replace("_", "."): list(addresses) for name, addresses in table.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.table:
            raise OSError("no such name")
        return self.table[host]


def refusal(url: str, policy: MediaPolicy = HERE, resolver: Names | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        anyio.run(functools.partial(media.aload, url, policy, resolver=resolver))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("path", ["/ok.png", "/untyped", "/octets"])
def test_a_picture_is_fetched(path: str, site) -> None:
    picture = media.load(site.url(path), HERE)
    assert picture.data == site.picture
    assert picture.source == site.url(path)
    assert anyio.run(media.aload, site.url(path), HERE) == picture


@pytest.mark.parametrize(
    "path",
    [
        *(f"/coded?{name}" for name in ("UTF-8", "aws-chunked", "binary", "identity", "none", "gzip", "br", "x,%20y")),
        *(f"/packed?{pair}" for pair in ("gzip,gzip", "gzip,x-GZIP", "gzip,", "gzip,utf-8", "twice,gzip%2C%20gzip")),
        *(f"/packed?{pair}" for pair in ("zlib,deflate", "raw,deflate", "gzip,aws-chunked%2C%20gzip")),
        *(f"/packed?{pair}" for pair in ("gzip,deflate", "zlib,gzip", "zlib,x-deflate", "raw,%22deflate%22")),
        *(f"/packed?{name},gzip" for name in ("members", "padded", "followed")),
        *(f"/labelled?{kind}" for kind in ("text/plain", "application/json", "binary/octet-stream", "nonsense")),
        "/status?203",
        "/status?201",
    ],
)
def test_the_first_bytes_decide_and_not_what_the_server_calls_them(path: str, site) -> None:
    assert media.load(site.url(path), HERE).data == site.picture


def test_what_inflates_beyond_the_limit_is_refused(site) -> None:
    policy = MediaPolicy(allowed_private=("127.0.0.1",), max_bytes=1_000_000)
    assert refusal(site.url("/packed?bomb,gzip"), policy).code == "image_too_large"


def test_every_byte_that_arrives_is_counted_and_the_count_can_end_it(site) -> None:
    counted: list[int] = []

    async def main() -> None:
        fetch.counter.set(counted.append)
        await media.aload(site.url(), HERE)

    anyio.run(main)
    assert sum(counted) == len(site.picture)


def test_the_request_carries_the_name_and_no_cookies(site) -> None:
    names = Names(pictures_example=["127.0.0.1"])
    url = f"http://Pictures.Example.:{site.port}/ok.png?size=2&name=%C3%A9#top"
    anyio.run(functools.partial(media.aload, url, HERE, resolver=names))
    path, headers = site.seen[-1]
    assert path == "/ok.png?size=2&name=%C3%A9"
    assert headers["host"] == f"pictures.example:{site.port}"
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("qvl/")
    assert "cookie" not in headers
    assert "authorization" not in headers


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing.png", "404 Not Found"),
        ("/failing", "503"),
        ("/page", "it is text/html, not a picture"),
        ("/packed?junk,zstd", "compressed it with zstd though it was asked not to"),
        ("/packed?junk,br", "br"),
        ("/packed?cut,gzip", "gzip compression is broken: the stream is cut short"),
        ("/packed?junk,deflate", "deflate compression is broken"),
        ("/status?202", "202"),
        ("/status?206", "206"),
        ("/announces-more", "peer closed connection"),
        ("/reset", "disconnected"),
        ("/loop", "more than 3 redirects"),
        ("/hop?4", "more than 3 redirects"),
    ],
)
def test_what_the_server_did_wrong_is_said(path: str, words: str, site) -> None:
    error = refusal(site.url(path))
    assert error.code == "image_fetch_failed"
    assert words in str(error)


@pytest.mark.parametrize("path", ["/broken", "/announces-less", "/empty"])
def test_a_body_that_is_no_whole_picture_is_not_decoded(path: str, site) -> None:
    error = refusal(site.url(path))
    assert error.code == "image_decode_failed"
    assert str(site.port) in str(error)


@pytest.mark.parametrize("path", ["/endless", "/announces-much"])
def test_more_bytes_than_allowed_are_not_read(path: str, site) -> None:
    policy = MediaPolicy(allowed_private=("127.0.0.1",), max_bytes=1_000_000)
    assert refusal(site.url(path), policy).code == "image_too_large"
    if path == "/endless":
        assert site.hung_up.wait(10)


@pytest.mark.parametrize("path", ["/silent", "/dripping"])
def test_a_slow_server_is_left_after_the_timeout(path: str, site) -> None:
    error = refusal(site.url(path), MediaPolicy(allowed_private=("127.0.0.1",), timeout=0.3))
    assert error.code == "image_fetch_failed"
    assert "no answer within 0.3 s" in str(error)


def test_nothing_listens(site) -> None:
    port = site.port
    site.shutdown()
    site.server_close()
    assert "cannot connect" in str(refusal(f"http://127.0.0.1:{port}/a.png"))


def test_up_to_three_redirects_are_followed(site) -> None:
    assert media.load(site.url("/hop?3"), HERE).data == site.picture
    assert [path for path, _ in site.seen] == ["/hop?3", "/hop?2", "/hop?1", "/ok.png"]
    assert "more than 0 redirects" in str(
        refusal(site.url("/hop?1"), MediaPolicy(allowed_private=("127.0.0.1",), max_redirects=0))
    )


INWARD = ["http://10.0.0.1/a.png", "//169.254.169.254/latest/meta-data/", "http://[::1]/a.png", "http://2130706434/"]
ELSEWHERE = ["file:///etc/hostname", "data:image/png;base64,AAAA", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/1"]
ODD = ["http://user:secret@127.0.0.1/a.png", "https:///a.png", "http://[::1", "http://127.0.0.1:99999/"]


@pytest.mark.parametrize("target", INWARD + ELSEWHERE + ODD)
def test_a_redirect_to_what_is_refused_is_not_followed(target: str, site) -> None:
    error = refusal(site.url(f"/to?{quote(target, safe=':/[]@')}"))
    assert error.code == "image_url_blocked"
    assert len(site.seen) == 1
    assert "secret" not in str(error)


def test_a_redirect_to_a_name_is_resolved_and_checked(site) -> None:
    names = Names(outer_example=["127.0.0.1"], inner_example=["192.168.1.7"])
    error = refusal(f"http://outer.example:{site.port}/to?http://inner.example/a.png", HERE, names)
    assert error.code == "image_url_blocked"
    assert "inner.example" in str(error)
    assert names.asked == ["outer.example", "inner.example"]


LOOPBACK = [
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0x7F.1",
    "017700000001",
    "0177.0.0.1",
    "127.255.255.254",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "%31%32%37.0.0.1",
]
PRIVATE = [
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "169.254.169.254",
    "0xa9fea9fe",
    "2852039166",
    "169.254.170.2",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "0.1.2.3",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a00:1::1]",
    "[fe80::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[100::1]",
    "[2001:db8::1]",
    "[3fff::1]",
    "metadata.google.internal",
    "metadata.google.internal.",
    "metadata",
]


@pytest.mark.parametrize("host", LOOPBACK + PRIVATE)
@pytest.mark.parametrize("port", ["", ":8000"])
def test_what_lies_inward_is_refused(host: str, port: str) -> None:
    error = refusal(f"http://{host}{port}/a.png", MediaPolicy(timeout=10))
    assert error.code == "image_url_blocked"


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.png",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://example.org:99999/",
        "http://exa mple.org/",
        "http://ex\x00ample.org/",
        "http://user@example.org/",
        "http://user:secret@example.org/a.png",
        "http://:secret@127.0.0.1/",
        "https://xn--/",
        "http://" + "a" * 300 + ".example/",
        "http://example.org\\@127.0.0.1/",
    ],
)
def test_odd_urls_are_refused(url: str) -> None:
    error = refusal(url, MediaPolicy(timeout=10), Names())
    assert error.code in ("image_url_blocked", "image_fetch_failed")
    assert "secret" not in str(error)


@pytest.mark.parametrize("addresses", [["93.184.216.34", "10.0.0.1"], ["10.0.0.1", "93.184.216.34"], ["::1"]])
def test_a_name_with_one_inward_address_is_refused(addresses: list[str]) -> None:
    error = refusal("http://both.example/a.png", MediaPolicy(), Names(both_example=addresses))
    assert error.code == "image_url_blocked"
    assert "both.example" in str(error)
    assert not any(address in str(error) for address in addresses)


def test_a_name_is_resolved_once_and_that_address_is_connected_to(site) -> None:
    class Rebinding(Names):
        async def __call__(self, host: str, port: int) -> list[str]:
            await super().__call__(host, port)
            return ["127.0.0.1"] if len(self.asked) == 1 else ["10.0.0.1"]

    names = Rebinding(rebinding_example=["127.0.0.1"])
    url = f"http://rebinding.example:{site.port}/ok.png"
    picture = anyio.run(functools.partial(media.aload, url, HERE, resolver=names))
    assert picture.data == site.picture
    assert names.asked == ["rebinding.example"]
    assert refusal(url, HERE, names).code == "image_url_blocked"


def test_the_next_address_is_tried_when_one_does_not_answer(site) -> None:
    names = Names(two_example=["127.0.0.2", "127.0.0.1"])
    policy = MediaPolicy(allowed_private=("127.0.0.0/8",))
    url = f"http://two.example:{site.port}/ok.png"
    assert anyio.run(functools.partial(media.aload, url, policy, resolver=names)).data == site.picture


def test_an_unknown_name_is_a_failed_fetch() -> None:
    for table in ({}, {"empty_example": []}, {"empty_example": ["not an address"]}):
        error = refusal("http://empty.example/", MediaPolicy(), Names(**table))
        assert error.code == "image_fetch_failed"
        assert "no address" in str(error)


def test_exceptions_are_made_by_name_address_and_network(site) -> None:
    names = Names(mine_example=["127.0.0.1"])
    url = f"http://mine.example:{site.port}/ok.png"
    for allowed in ("mine.example", "MINE.example.", "127.0.0.1", "127.0.0.0/8"):
        policy = MediaPolicy(allowed_private=(allowed,))
        assert anyio.run(functools.partial(media.aload, url, policy, resolver=names)).data == site.picture
    for allowed in ("example", "other.example", "127.0.0.2", "10.0.0.0/8", "::1"):
        assert refusal(url, MediaPolicy(allowed_private=(allowed,)), names).code == "image_url_blocked"
    mapped = f"http://[::ffff:127.0.0.1]:{site.port}/ok.png"
    assert refusal(mapped, MediaPolicy(allowed_private=("::1",))).code == "image_url_blocked"


def test_only_allowed_domains_are_asked_for_and_fetched_from(site) -> None:
    names = Names(a_example=["127.0.0.1"], b_a_example=["127.0.0.1"], evila_example=["127.0.0.1"])

    def policy(*domains: str) -> MediaPolicy:
        return MediaPolicy(allowed_private=("127.0.0.1",), allowed_domains=domains)

    def fetch(host: str, *domains: str, path: str = "/ok.png") -> media.Picture:
        url = f"http://{host}:{site.port}{path}"
        return anyio.run(functools.partial(media.aload, url, policy(*domains), resolver=names))

    assert fetch("a.example", "a.example")
    assert fetch("A.EXAMPLE.", "other", "a.example")
    assert fetch("b.a.example", ".a.example")
    assert fetch("a.example", ".a.example")
    asked = len(names.asked)
    for host, domain in [("b.a.example", "a.example"), ("evila.example", ".a.example"), ("127.0.0.1", "a.example")]:
        with pytest.raises(MediaError, match="is not allowed"):
            fetch(host, domain)
    with pytest.raises(MediaError, match="is not allowed"):
        fetch("a.example", "a.example", path=f"/to?http://b.a.example:{site.port}/ok.png")
    assert len(names.asked) == asked + 1


def test_proxies_of_the_environment_are_not_used(site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert media.load(site.url(), HERE).data == site.picture


def test_errors_and_names_show_neither_credentials_nor_query(site) -> None:
    url = site.url("/missing.png?token=secret#secret")
    assert "secret" not in str(refusal(url))
    assert media.load(site.url("/ok.png?token=secret"), HERE).source == site.url("/ok.png")
    assert public_name("https://user:secret@example.org/a.png?k=secret#secret") == "https://example.org/a.png"
    assert public_name("http://[::1:secret]/") == "the URL"


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.integers(0, 2**32 - 1))
def test_every_spelling_of_an_address_is_judged_alike(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    a, b, c, d = address.packed
    spellings = [str(number), hex(number), f"0{number:o}", f"{a}.{number & 0xFFFFFF}", f"{a:#x}.{b}.{(c << 8) + d}"]
    spellings += [f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a}.{b}.{c}.{d}"]
    assert {literal(spelling) for spelling in spellings} == {address}
    wrapped = [f"::ffff:{address}", f"64:ff9b::{address}"]
    assert {is_public(ipaddress.ip_address(text)) for text in wrapped} == {is_public(address)}
    if not is_public(address):
        assert not is_public(ipaddress.IPv6Address((0x2002 << 112) | (number << 80)))
    assert not is_public(ipaddress.IPv6Address(number))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for pictures.example, signed by its own key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=pictures.example -addext subjectAltName=DNS:pictures.example -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


def test_certificates_are_checked_for_the_name_not_the_address(site, certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    names = Names(pictures_example=["127.0.0.1"], other_example=["127.0.0.1"])
    fetcher = Fetcher(HERE, resolver=names, tls=ssl.create_default_context(cafile=str(certificate[0])))
    assert anyio.run(fetcher.fetch, f"https://pictures.example:{site.port}/ok.png") == site.picture
    for url in (f"https://other.example:{site.port}/ok.png", f"https://127.0.0.1:{site.port}/ok.png"):
        with pytest.raises(MediaError, match="certificate"):
            anyio.run(fetcher.fetch, url)
    assert asked[:2] == ["pictures.example", "other.example"]
    assert len(site.seen) == 1
    with pytest.raises(MediaError, match="certificate"):
        anyio.run(Fetcher(HERE, resolver=names).fetch, f"https://pictures.example:{site.port}/ok.png")
